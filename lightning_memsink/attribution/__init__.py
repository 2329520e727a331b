"""What hidden units and layers do for each sample: unit effects and per-sample gradient norms."""

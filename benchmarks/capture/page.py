"""docs/losses.md: every loss and layout of the matrix, how it is read, in which unit, and what is refused.

python -m benchmarks.capture --markdown > docs/losses.md
"""

HEAD = """# Losses, layouts and batches

Written by `python -m benchmarks.capture --markdown`: each line is a fit of a module as a user writes it, and every
recorded loss is compared with the sample's own at the same weights.

**How a loss is read.** Every loss ends in means and sums: of a tensor, or within a loss function of
`torch.nn.functional`. In the first eight steps and in every fiftieth the calls of `training_step` are watched: what
each mean was taken of, and, from the batch's tensors on, whose each element is. The loss must be a linear
combination of such means; its factors are read off the graph. Steps between are read from autograd's nodes alone,
where these gave the same in the watched steps; else every step is watched. Validation is always watched.

**Whose a row is.** A row belongs to a sample if the way from the batch to it says so: views, `cat`, `stack`,
`chunk`, `repeat_interleave`, transposition, masks, indexes, `gather`, layers, attention within a sample. Where that
way can't be followed (compiled code) the targets say it: views of the batch, or equal to it in one order only. It
is never taken from the number of rows. An element that mixes samples (mixup), and a statistic of the batch, belong
to nobody. Between watched steps a step that orders its rows by chance, without a tensor as index and without
changing the batch's tensors, is not seen.

**The unit.** A sample's loss is the mean over its elements that count (nats per token), whatever the batch is
divided by; a `kl_div` with `batchmean` is summed over classes. A loss multiplied with a factor counts without it.
Several losses are added as the step adds them, each factor times mean. Weights of elements weigh, and cancel where
a sample has one element.

**What is refused.** Losses that are not linear in means over samples (roots, dice of the batch), custom autograd
functions, parts that can't be followed, and steps of which less than 95 % or more than 105 % of the loss is read,
unless the rest is a penalty on parameters. Validation with another loss than training has no controls. Remedies:
`return per_sample(losses, ids)`, or `memsink(loss=function(batch, outputs) -> [B])`, whose losses win over all
others.

**Mitigation** weighs the rows of named samples in the backward, where one number becomes many. It leaves a step
alone, and says so, where it can't: compiled losses, and losses multiplied with a learned parameter, whose gradient
is of all samples together.

"""

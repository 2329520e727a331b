

def test_names_stand_for_what_the_batch_has():
    batch = {"source": torch.tensor([1, 0, 1, 7])}
    assert SourceLabels(names=["books", "web"]).of(batch, 4, None) == ["web", "books", "web", "7"]
    assert SourceLabels(names={7: "mail"}).of(batch, 4, None) == ["1", "0", "1", "mail"]
    assert SourceLabels(names={"cc-by": "open"}).of({"source": ["cc-by", "mit"]}, 2, None) == ["open", "mit"]
    with pytest.raises(ValueError, match="names is a list or a mapping of labels, but it is a str: 'books'"):
        SourceLabels(names="books")

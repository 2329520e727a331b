"""What is planted is exactly what is said to be planted."""

import math
from collections import Counter

import pytest
import torch

from lightning_memsink.extraction.canaries import plant_canaries
from lightning_memsink.samples.hashing import content_ids

VOCABULARY, CONTEXT = 300, 64


def text(rows, seed):
    return torch.randint(VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(seed))


BACKGROUND, HELD_OUT, NATURAL = text(50, 1), text(20, 2), text(40, 3)


def plant(**options):
    chosen = {"repeats": (1, 4, 16), "per_rung": 5, "canaries": 3, "easy": 4, "twins": 10, "seed": 0, **options}
    return plant_canaries(BACKGROUND, HELD_OUT, chosen.pop("natural", NATURAL), vocab_size=VOCABULARY, **chosen)


@pytest.fixture(scope="module")
def planted():
    return plant()


def rows_of(tokens):
    return Counter(map(tuple, tokens.tolist()))


def test_every_sequence_is_shown_as_often_as_its_group_says(planted):
    """And nothing else is in the training data but the background, once."""
    expected = rows_of(BACKGROUND)
    for group in planted.groups:
        for row in map(tuple, group.sequences.tolist()):
            expected[row] += group.repeats
    assert rows_of(planted.train) == expected


def test_twins_are_controls_and_never_trained_on(planted):
    controls, train = rows_of(planted.controls), rows_of(planted.train)
    assert set(map(tuple, HELD_OUT.tolist())) <= set(controls)
    for group in planted.groups:
        twins = rows_of(group.twins)
        assert len(group.twins) == 10
        assert twins.keys() <= controls.keys() and not twins.keys() & train.keys()
    assert len(planted.controls) == len(HELD_OUT) + 3 * 10


def test_groups_are_named_by_kind_and_repeats(planted):
    names = [group.name for group in planted.groups]
    assert names == [*(f"{kind} x{times}" for kind in ("natural", "canary") for times in (1, 4, 16)), "easy x64"]
    assert [len(group.sequences) for group in planted.groups] == [5, 5, 5, 3, 3, 3, 4]


def test_ids_are_those_a_tracker_by_content_will_see(planted):
    for group in planted.groups:
        assert torch.equal(group.ids, content_ids({"input_ids": group.sequences}))
        assert torch.equal(group.twin_ids, content_ids({"input_ids": group.twins}))


def test_an_easy_sequence_holds_at_most_three_times_three_bits_of_its_own(planted):
    """The family agrees on all but three tokens, each out of eight: that bounds what learning one by heart saves."""
    easy = next(group for group in planted.groups if group.kind == "easy")
    family = torch.cat([easy.sequences, easy.twins])
    choices = [len(set(column.tolist())) for column in family.T]
    assert sum(count > 1 for count in choices) == 3 and max(choices) <= 8
    assert len(rows_of(family)) == len(family)
    assert 3 * math.log(8) / (CONTEXT - 1) < 0.1


def test_real_text_that_was_background_or_held_out_is_not_planted():
    """Else it would be shown once more than its group says, or its twin would be no twin."""
    mixed = torch.cat([BACKGROUND, NATURAL, HELD_OUT, NATURAL])
    known = rows_of(BACKGROUND) | rows_of(HELD_OUT)
    natural = [group for group in plant(natural=mixed).groups if group.kind == "natural"]
    used = rows_of(torch.cat([*(group.sequences for group in natural), natural[0].twins]))
    assert not used.keys() & known.keys()
    assert set(used.values()) == {1}


def test_the_seed_decides_everything_and_the_global_generator_nothing():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = plant()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(plant().train, first.train)
    assert not torch.equal(plant(seed=1).train, first.train)


def test_kinds_can_be_left_out():
    planted = plant(per_rung=0, canaries=0, natural=NATURAL[:0])
    assert [group.kind for group in planted.groups] == ["easy"]
    assert len(planted.controls) == len(HELD_OUT) + 10


def test_too_little_text_is_said_with_what_to_lower():
    message = r"needs 25 sequences of `natural` \(3 groups of 5, and 10 twins\), but 20 of 20 are left.*lower per_rung"
    with pytest.raises(ValueError, match=message):
        plant(natural=NATURAL[:20])


def test_more_easy_sequences_than_the_family_has_is_said():
    with pytest.raises(ValueError, match="easy family has 512 members, but easy \\+ twins is 600"):
        plant(easy=590)

"""Sets made from sets: exact counts, order kept, the same generator gives the same set."""

import pytest
import torch

from scrimp.data import FileImages, TensorImages
from scrimp.data.variants import duplicate, long_tail, noisy_labels, stratified_split, subset
from scrimp.primitives.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(counts):
    """Image i is filled with i, so that results show where they come from."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=seeded(5))]
    return TensorImages(torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1), labels)


def numbers(images):
    return images.pixels.flatten().tolist()


def test_subset_of_both_kinds():
    images = numbered([3, 3])
    assert numbers(subset(images, torch.tensor([4, 4, 0]))) == [4, 4, 0]
    files = subset(FileImages(list("abc"), torch.arange(3), size=4), torch.tensor([2, 0]))
    assert files.paths == ("c", "a")
    assert files.labels.tolist() == [2, 0]
    for wrong in (6, -1):
        with pytest.raises(InputError, match=str(wrong)):
            subset(images, torch.tensor([0, wrong]))


def test_long_tail_is_exponential():
    images = numbered([60, 60, 60, 60, 10])
    tail = long_tail(images, ratio=16, generator=seeded())
    assert tail.labels.bincount().tolist() == [60, 30, 15, 8, 4]
    assert numbers(tail) == sorted(numbers(tail))
    assert torch.equal(images.labels[torch.tensor(numbers(tail))], tail.labels)
    assert numbers(long_tail(images, ratio=16, generator=seeded())) == numbers(tail)
    assert numbers(long_tail(images, ratio=16, generator=seeded(1))) != numbers(tail)


def test_long_tail_uses_no_more_than_there_are():
    counts = long_tail(numbered([100, 20, 10]), ratio=4, generator=seeded()).labels.bincount().tolist()
    assert counts == [40, 20, 10]
    assert long_tail(numbered([9, 9]), ratio=1, generator=seeded()).labels.bincount().tolist() == [9, 9]
    assert long_tail(numbered([9, 9]), ratio=1000, generator=seeded()).labels.bincount().tolist() == [9, 1]


def test_duplicate():
    images = numbered([4, 4])
    assert numbers(duplicate(images, copies=3, indices=torch.tensor([1, 6]))) == [0, 1, 1, 1, 2, 3, 4, 5, 6, 6, 6, 7]
    some = duplicate(images, copies=10, fraction=0.25, generator=seeded())
    counts = torch.tensor(numbers(some)).bincount().tolist()
    assert sorted(counts) == [1] * 6 + [10] * 2
    assert torch.equal(some.labels, images.labels[torch.tensor(numbers(some))])
    assert numbers(duplicate(images, copies=1, fraction=1.0, generator=seeded())) == list(range(8))


def test_noisy_labels():
    images = numbered([50, 50, 50])
    before = images.labels.clone()
    noisy = noisy_labels(images, fraction=0.4, classes=3, generator=seeded())
    changed = noisy.labels != before
    assert int(changed.sum()) == 60
    assert set(noisy.labels.tolist()) == {0, 1, 2}
    wrong = (noisy.labels - before)[changed] % 3
    assert set(wrong.tolist()) == {1, 2}
    assert noisy.pixels.data_ptr() == images.pixels.data_ptr()
    assert torch.equal(images.labels, before)


def test_stratified_split():
    labels = numbered([40, 10, 2, 1]).labels
    train, test = stratified_split(labels, fraction=0.2, generator=seeded())
    assert labels[test].bincount(minlength=4).tolist() == [8, 2, 1, 0]
    assert sorted(train.tolist() + test.tolist()) == list(range(53))
    assert train.tolist() == sorted(train.tolist())
    again = stratified_split(labels, fraction=0.2, generator=seeded())
    assert torch.equal(test, again[1])
    assert not torch.equal(test, stratified_split(labels, fraction=0.2, generator=seeded(1))[1])
    most = stratified_split(labels, fraction=0.99, generator=seeded())[0]
    assert labels[most].bincount(minlength=4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda images: long_tail(images, ratio=0.5, generator=seeded()),
        lambda images: long_tail(images, ratio=float("nan"), generator=seeded()),
        lambda images: duplicate(images, copies=0, fraction=0.5, generator=seeded()),
        lambda images: duplicate(images, copies=2, generator=seeded()),
        lambda images: duplicate(images, copies=2, fraction=0.5),
        lambda images: duplicate(images, copies=2, fraction=1.5, generator=seeded()),
        lambda images: duplicate(images, copies=2, fraction=0.5, indices=torch.tensor([0]), generator=seeded()),
        lambda images: duplicate(images, copies=2, indices=torch.tensor([99])),
        lambda images: noisy_labels(images, fraction=0.5, classes=1, generator=seeded()),
        lambda images: noisy_labels(images, fraction=-0.5, classes=2, generator=seeded()),
        lambda images: stratified_split(images.labels, fraction=1.0, generator=seeded()),
    ],
)
def test_wrong_input(call):
    with pytest.raises(InputError):
        call(numbered([4, 4]))

"""Every row's check passes on the method and fails on one that is broken; both sides do comparable work."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from active_twins import BROKEN_ACTIVE
from adapt_twins import BROKEN_ADAPT
from adaptive_twins import BROKEN_ADAPTIVE
from attack_twins import BROKEN_ATTACK
from denoise_twins import BROKEN_DENOISE
from represent_twins import BROKEN_REPRESENT
from sampling_twins import BROKEN_SAMPLING
from splat_twins import BROKEN_SPLATS
from torch.utils.flop_counter import FlopCounterMode

from scrimp.attend import (
    Groups,
    clustered_attention,
    improved_clustered_attention,
    linear_attention,
    linear_attention_step,
)
from scrimp.compare import COMPARISONS, Comparison, Finding, active, adaptive, attention, find_comparisons
from scrimp.compare.comparison import at_least, at_most
from scrimp.compare.exact import deviation, drifted
from scrimp.compare.importance import DRAWS, MEANS
from scrimp.meter import Reading, count_flops
from scrimp.primitives.errors import InputError
from scrimp.select import (
    Policy,
    Presampler,
    Selection,
    gradient_norm_bound,
    history,
    importance_sample,
    prune,
    uniform_sample,
    variance_reduction,
)

ROWS = {row.name: row for row in COMPARISONS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: a second thread would only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", COMPARISONS, ids=lambda row: row.name)
def test_the_check_passes(row: Comparison) -> None:
    found = row.check(seed=1)
    assert len(found) >= 3
    assert [str(item) for item in found if not item.passed] == []


def unweighted(scores, budget, *, generator):
    return Selection(importance_sample(scores, budget, generator=generator).indices, torch.ones(budget))


def blind(scores, budget, *, generator):
    return uniform_sample(len(scores), budget, generator=generator)


def losses_as_scores(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


class Weightless(Presampler):
    def __call__(self, batches):
        for inputs, targets, weights in super().__call__(batches):
            yield inputs, targets, torch.ones_like(weights)


class Gateless(Presampler):
    """Takes its gate to be open always."""

    def __call__(self, batches):
        self.gate.threshold = -1.0
        return super().__call__(batches)


class Hasty(Presampler):
    """Opens on the latest tau, not on its average."""

    def observe(self, scores):
        self.gate.tau = variance_reduction(scores)


class Shuffling(Presampler):
    """Tears inputs and targets apart."""

    def __call__(self, batches):
        for inputs, targets, weights in super().__call__(batches):
            yield inputs.flip(0), targets, weights


def changed(policy, change):
    """A maker of policies whose plans pass through ``change(record, plan, budget, generator)``."""

    def make(**options) -> Policy:
        inner = policy(**options)

        def plan(record, budget, *, generator):
            return change(record, inner(record, budget, generator=generator), budget, generator)

        return plan

    return make


def without_weights(record, plan, budget, generator):
    return Selection(plan.indices, torch.ones(len(plan)))


def drawn_on_its_own(record, plan, budget, generator):
    """Independent draws of the very probabilities that systematic sampling had."""
    scores = record.filled() / record.filled().sum()
    return importance_sample(0.8 * scores + 0.2 / len(scores), budget, generator=generator)


def never_stale(*, staleness: int = 4, **options) -> Policy:
    return history(staleness=10**6, **options)


def mixing_more(*, mix: float = 0.2, **options) -> Policy:
    return history(mix=2 * mix, **options)


def always_open(*, gate: float = 1.0, **options) -> Policy:
    return history(gate=1.0, **options)


def careless(record, plan, budget, generator):
    """Leaves out a third of whatever is there."""
    kept = torch.rand(len(plan), generator=generator) >= 0.3
    return Selection(plan.indices[kept], plan.weights[kept])


def never_final(*, final: float = 0.0, **options) -> Policy:
    return prune(final=0.0, **options)


def leaking(*tensors, causal):
    return linear_attention(*tensors, causal=False)


def without_key_gradient(query, key, value, *, causal):
    return linear_attention(query, key.detach() + 0 * key, value, causal=causal)


def forgetful(state, *tensors):
    return linear_attention_step(None, *tensors)


def unscaled(*tensors, groups, **options):
    return clustered_attention(*tensors, groups=groups, scale=1.0)


def all_in_one_group(query, key, value, *, groups):
    together = torch.zeros_like(groups.assignment)
    counts = torch.zeros_like(groups.counts).index_fill(2, torch.tensor(0), groups.assignment.shape[2])
    return clustered_attention(query, key, value, groups=Groups(together, counts))


def without_gradient_by_mass(query, key, value, *, groups, topk):
    """The old library's fault: the mass of the top keys is taken for a constant."""
    if topk >= key.shape[2]:
        return improved_clustered_attention(query, key, value, groups=groups, topk=topk)
    exact = improved_clustered_attention(query, key, value, groups=groups, topk=topk)
    by_mass = attention._by_query(query, key, value, assignment=groups.assignment, topk=topk) - attention._by_query(
        query.detach(), key.detach(), value, assignment=groups.assignment, topk=topk
    )
    return exact - by_mass + by_mass.detach()


def short_of_keys(query, key, value, *, groups, topk):
    return improved_clustered_attention(query, key, value, groups=groups, topk=topk - 1)


def by_torch(fn) -> Reading:
    with FlopCounterMode(display=False) as counter:
        fn()
    return Reading(counter.get_total_flops() * 0.99)  # torch may learn to count the fused kernels one day


BROKEN = [
    ("importance-sampling", {"sample": unweighted}, "expected weighted gradient"),
    ("importance-sampling", {"sample": unweighted}, "against the full batch"),
    ("importance-sampling", {"sample": blind}, "frequencies"),
    ("importance-sampling", {"bound": losses_as_scores}, "gradient at the outputs"),
    ("importance-sampling", {"bound": lambda logits, _: logits.detach().abs().sum(1)}, "rank correlation"),
    ("importance-sampling", {"tau": lambda scores: variance_reduction(scores) ** 2}, "tau"),
    ("presample", {"presampler": Weightless}, "expected weighted value"),
    ("presample", {"presampler": Gateless}, "gate shut: batches"),
    ("presample", {"presampler": Gateless}, "gate shut: scoring"),
    ("presample", {"presampler": Hasty}, "Algorithm 1"),
    ("presample", {"presampler": Shuffling}, "rows that do not belong"),
    ("history", {"policy": changed(history, without_weights)}, "expected weighted value"),
    ("history", {"policy": changed(history, drawn_on_its_own)}, "in any one plan"),
    ("history", {"policy": always_open}, "gate shut"),
    ("history", {"policy": never_stale}, "from visit to visit"),
    ("history", {"policy": mixing_more}, "mean count"),
    ("prune", {"policy": changed(prune, without_weights)}, "expected weighted sum"),
    ("prune", {"policy": changed(prune, careless)}, "hard or unseen"),
    ("prune", {"policy": lambda share, final: prune(share=share / 2, final=final)}, "frequencies"),
    ("prune", {"policy": never_final}, "final phase"),
    ("linear", {"attention": leaking}, "causal: output"),
    ("linear", {"attention": without_key_gradient}, "full: gradients"),
    ("recurrent", {"step": forgetful}, "a prefix, then"),
    ("recurrent", {"step": forgetful}, "in chunks"),
    ("clustered", {"attention": unscaled}, "groups given: output"),
    ("clustered", {"attention": all_in_one_group}, "one query a cluster against softmax: output"),
    ("improved-clustered", {"attention": without_gradient_by_mass}, "groups given: gradients"),
    ("improved-clustered", {"attention": short_of_keys}, "top-k of all keys against softmax: output"),
    *BROKEN_REPRESENT,
    *BROKEN_ADAPT,
    *BROKEN_SAMPLING,
    *BROKEN_SPLATS,
    *BROKEN_ADAPTIVE,
    *BROKEN_ATTACK,
    *BROKEN_ACTIVE,
    *BROKEN_DENOISE,
    ("flop-counter", {"count": by_torch}, "forward, relative"),
    ("flop-counter", {"count": lambda fn: dataclasses.replace(count_flops(fn), missed=("aten::mm",))}, "missed"),
]


@functools.cache
def found_broken(case: int) -> list[Finding]:
    name, broken, _ = BROKEN[case]
    same = next(i for i, (other, ways, _) in enumerate(BROKEN) if (other, ways) == (name, broken))
    return ROWS[name].check(**broken) if same == case else found_broken(same)


@pytest.mark.parametrize("case", range(len(BROKEN)), ids=lambda case: f"{BROKEN[case][0]}: {BROKEN[case][2]}")
def test_the_check_fails_on_a_broken_method(case: int) -> None:
    (failing,) = [item for item in found_broken(case) if BROKEN[case][2] in item.what]
    assert not failing.passed


def test_every_row_has_a_broken_method() -> None:
    assert {name for name, _, _ in BROKEN} == set(ROWS)


def test_one_percent_is_twice_and_more_what_chance_makes_of_the_mean() -> None:
    problem = drifted()
    scores = gradient_norm_bound(problem.logits, problem.targets)
    assert 0 < deviation(problem.gradients, scores / scores.sum(), MEANS * DRAWS) < 0.01 / 2.5


def test_the_deviation_is_that_of_all_outcomes() -> None:
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mean, second = gradients.mean(0), 0.0
    for i in range(3):
        for j in range(3):
            estimate = (gradients[i] / (3 * p[i]) + gradients[j] / (3 * p[j])) / 2
            second += float(p[i] * p[j] * (estimate - mean).square().sum())
    assert deviation(gradients, p, 2) == pytest.approx(math.sqrt(second) / float(mean.norm()))


ATTENTION = ["linear", "recurrent", "clustered", "improved-clustered"]
REPRESENT = ["mean-shift", "constrained-mean-shift", "regression"]
EXTRA = {"importance-sampling": {"steps": 1}, "flop-counter": {}, **{name: {"tokens": 1024} for name in ATTENTION}}
ADAPTIVE = ["token-merging", "keep-tokens", "token-sampling", "token-halting", "gating"]
OTHER = ["nola", "attention-sampling", "splat-codec", "active-labels", *ADAPTIVE, "attack"]
EXTRA.update({name: {} for name in [*REPRESENT, *OTHER]})
EXTRA["attack"] = {"steps": 10}


@pytest.fixture(scope="module")
def built():
    """Both sides of every row, made small."""
    return {name: row.sides(seed=3, **EXTRA.get(name, {"steps": 2})) for name, row in ROWS.items()}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_does_less_work_than_softmax(name: str, built) -> None:
    sides = built[name]
    assert 0 < count_flops(sides.method).value < 0.5 * count_flops(sides.baseline).value
    assert count_flops(sides.method).missed == ()


@pytest.mark.parametrize("name", [name for name in ROWS if name not in (*ATTENTION, *REPRESENT, *OTHER)])
def test_both_sides_do_comparable_work(name: str, built) -> None:
    sides = built[name]
    sides.method()
    ours, theirs = count_flops(sides.method).value, count_flops(sides.baseline).value
    # One presampled step also scores three batches, a forward pass each.
    more = 3 * 64 * forward_flops() if name == "importance-sampling" else 0
    assert ours == theirs + more > 0


def test_combining_bases_adds_little_to_loras_work(built) -> None:
    """Twice the entries of the factors times 8 + 8, forward and backward, beside 256 tokens through all layers."""
    ours, theirs = count_flops(built["nola"].method), count_flops(built["nola"].baseline)
    assert ours.missed == theirs.missed == ()
    entries = 8 * 4 * (192 + 768)
    assert ours.value - theirs.value == pytest.approx(2 * 2 * 16 * entries, rel=0.1)
    assert theirs.value < ours.value < 1.01 * theirs.value


def test_sampled_patches_cost_their_pixels_and_the_small_view(built) -> None:
    """By the layers' dimensions: forward, towards the weights and, but for the first layer, towards the input."""
    ours, theirs = count_flops(built["attention-sampling"].method), count_flops(built["attention-sampling"].baseline)
    assert ours.missed == theirs.missed == ()
    classifier, batch = 3 * 2 * 32 * 10, 2
    pixel = 2 * 2 * 27 * 16 / 4 + 3 * (2 * 144 * 32 / 16 + 2 * 288 * 32 / 64)
    view = 64 * 64 * (2 * 2 * 27 * 8 + 3 * 2 * 72 * 8 + 3 * 2 * 72)
    assert theirs.value == batch * (512 * 512 * pixel + classifier)
    assert ours.value == batch * (10 * 32 * 32 * pixel + view + classifier)
    assert ours.value < 0.07 * theirs.value


def test_the_container_takes_a_fraction_of_the_bytes(built) -> None:
    ours, theirs = built["splat-codec"].quality["stored_bytes"]
    assert theirs > 20_000 * 4 * (3 + 4 + 3 + 1 + 3 + 24)
    assert ours < 0.15 * theirs
    assert len(built["splat-codec"].method()) == ours


@pytest.mark.parametrize("name", ADAPTIVE)
def test_fewer_tokens_cost_what_the_ledger_says(name: str, built) -> None:
    sides = built[name]
    for side, an_image in zip((sides.method, sides.baseline), sides.quality["flops_an_image"], strict=True):
        counted = count_flops(side)
        assert counted.missed == ()
        assert counted.value == adaptive.BATCH * an_image
    assert sides.quality["flops_an_image"][0] < 0.85 * sides.quality["flops_an_image"][1]


def test_a_made_patch_undoes_what_chance_does_not_at_the_cost_of_its_steps(built) -> None:
    """Each step and the last look: forward of 65 tokens in 4 blocks, and backward to the pixels alone of the first 3.

    Nothing depends on the scores of the last block.
    """
    ours, theirs = built["attack"].quality["attack_success"]
    assert ours > theirs + 0.2
    assert abs(theirs) < 0.2
    counted = count_flops(built["attack"].method)
    assert counted.missed == ()
    assert count_flops(built["attack"].baseline).value == 0
    patches, layers, products = 2 * 64 * 64 * 192, 2 * 65 * 64 * 64 * 12, 2 * 2 * 65 * 65 * 64
    forward, backward = 4 * (layers + products), 3 * (layers + 2 * products)
    assert counted.value == pytest.approx(11 * 16 * (2 * patches + forward + backward), rel=0.01)


def test_typical_images_are_of_more_classes_than_random_ones(built) -> None:
    ours, theirs = built["active-labels"].quality["classes_seen"]
    assert theirs + 3 <= ours <= active.LABELS
    chosen = built["active-labels"].method()
    assert len(chosen.unique()) == len(chosen) == active.LABELS


def forward_flops() -> int:
    """Of the small convnet, one image: layer by layer."""
    return 2 * (14 * 14 * 16 * 25 + 14 * 14 * 32 * 16 * 9 + 7 * 7 * 64 * 32 * 9 + 576 * 10)


def test_the_qualities_say_what_the_baseline_lacks(built) -> None:
    for name in ("importance-sampling", "denoise"):
        ours, theirs = built[name].quality["gradient_noise"]
        assert 0 < ours < theirs
    ours, theirs = built["flop-counter"].quality["share_counted"]
    assert ours == pytest.approx(1, rel=1e-3)
    assert theirs <= 1


def test_names_are_different_and_found() -> None:
    assert len(ROWS) == len(COMPARISONS)
    assert find_comparisons("all") == list(COMPARISONS)
    assert find_comparisons("history") == [ROWS["history"]]
    with pytest.raises(InputError, match=r"importance-sampling, .*, all; got nothing"):
        find_comparisons("nothing")


def test_findings_hold_figures_against_bounds() -> None:
    assert at_most("error", 0.1, 0.1).passed
    assert not at_most("error", 0.2, 0.1).passed
    assert at_least("rank", 0.95, 0.9).passed
    assert not at_least("rank", 0.8, 0.9).passed
    assert str(at_least("rank", 0.95, 0.9)) == "rank: 0.95 (at least 0.9)"
    assert at_most("error", 0.2, 0.1).to_dict() == {"what": "error", "figure": 0.2, "at most": 0.1, "passed": False}


@pytest.mark.parametrize("judge", [at_most, at_least])
def test_what_is_no_number_passes_nothing(judge) -> None:
    finding = judge("error", math.nan, 0.1)
    assert not finding.passed
    assert finding.to_dict()["figure"] is None

"""Adapters on and off a model: it starts as it was, comes back as it was, and forgets no adapter."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from scrimp.adapt.attach import adapters, attach_, detach_, merge_, use_
from scrimp.adapt.install import exchange_, recipe_for, state_of
from scrimp.adapt.lora import lora
from scrimp.adapt.methods import bias, full, linear
from scrimp.adapt.nola import nola
from scrimp.primitives.errors import InputError

METHODS = {
    "lora": lora(2),
    "nola": nola(2, 6, seed=4),
    "nola, 4 bits": nola(2, 6, bits=4),
    "shared": nola(2, 9, shared=True),
}


class Small(nn.Module):
    """One of each kind of weight, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(5, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mask_bias", torch.zeros(3), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.stem(images)).flatten(2).mT
        tokens = tokens + self.table(torch.arange(tokens.shape[1], device=tokens.device) % 5)
        tokens = tokens + self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return self.fc(self.mlp(tokens).mean(1))


WEIGHTS = ["stem", "attn.in_proj_weight", "attn.out_proj", "mlp.0", "mlp.2"]


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Small()
    model.fc.weight.requires_grad_(False)  # a flag that must come back
    return model.eval()


def single(*shape: int) -> nn.Module:
    with torch.random.fork_rng():
        return nn.Sequential(nn.Linear(*shape))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def shake_(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def picture(model: nn.Module) -> dict:
    """All that `detach_` and errors have to leave as it was."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "parameters": [(name, id(item), item.requires_grad) for name, item in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "hooks": [
            [len(hooks) for hooks in (item._forward_hooks, item._forward_pre_hooks, item._forward_hooks_with_kwargs)]
            for item in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [name for name, item in model.named_parameters() if item.grad is not None],
    }  # fmt: skip


def assert_same(before: dict, after: dict) -> None:
    assert list(before["state"]) == list(after["state"])
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key]), key
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_starts_as_it_was_and_comes_back_bit_for_bit(method):
    model, inputs = small(), images()
    with torch.no_grad():
        bare = model(inputs)
    before = picture(model)
    assert attach_(model, method) == WEIGHTS
    with torch.no_grad():
        assert torch.equal(model(inputs), bare)
    assert all("adapter" in name for name in trained(model))
    shake_(model)
    loss = model(inputs).square().sum()
    loss.backward()
    assert (loss.detach() - bare.square().sum()).abs() > 1e-3
    detach_(model)
    assert_same(before, picture(model))
    with torch.no_grad():
        assert torch.equal(model(inputs), bare)
    assert adapters(model) == ()


def test_only_the_numbers_move():
    model, inputs = small(), images()
    attach_(model, lora(2), also=r"^fc\.")
    frozen = {key: item.detach().clone() for key, item in model.named_parameters() if not item.requires_grad}
    assert {"fc.weight", "fc.bias"} < set(trained(model))
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = (model(inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    now = dict(model.named_parameters())
    assert len(frozen) > 5
    assert all(torch.equal(now[key], value) and now[key].grad is None for key, value in frozen.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("also", [None, r"^(fc|norm)\."])
def test_merging_gives_the_same_outputs(method, also):
    model, inputs = small(), images()
    before = picture(model)
    attach_(model, method, also=also)
    shake_(model)
    with torch.no_grad():
        adapted = model(inputs)
        merge_(model)
        merged = model(inputs)
    assert float((adapted - merged).abs().max()) <= 1e-6 * max(1.0, float(adapted.abs().max()))
    after = picture(model)
    changed = {key for key in before["state"] if not torch.equal(before["state"][key], after["state"][key])}
    expected = {f"{name}.weight".replace("in_proj_weight.weight", "in_proj_weight") for name in WEIGHTS}
    assert changed == expected | ({"fc.weight", "fc.bias", "norm.weight", "norm.bias"} if also else set())
    for key in ("parameters", "modules", "hooks", "attributes"):
        assert before[key] == after[key]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_merging_rounds_once(dtype):
    """Against float64; a float64 weight must not pass through float32."""
    model = single(6, 5).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 3)
    exact = model[0].weight.detach().double()
    attach_(model, lora(2))
    shake_(model)
    exact = exact + model[0].adapter.delta().detach().double()
    merge_(model)
    wanted = exact if dtype is torch.float64 else exact.float()
    torch.testing.assert_close(
        model[0].weight.detach().to(wanted.dtype), wanted, rtol=float(torch.finfo(dtype).eps), atol=0
    )


def test_methods_that_train_what_is_there():
    model = small()
    before = picture(model)
    assert attach_(model, bias(), also="fc") == []
    assert trained(model) == [
        name for name, _, _ in before["parameters"] if name.endswith("bias") or name == "fc.weight"
    ]
    detach_(model)
    assert_same(before, picture(model))

    attach_(model, linear(), also=r"fc")
    assert trained(model) == ["fc.weight", "fc.bias"]
    detach_(model)

    attach_(model, full())
    assert trained(model) == [name for name, _, _ in before["parameters"]]
    recipe = state_of(model).recipe
    assert "norm.running_mean" in recipe.also
    assert "mask_bias" not in recipe.also
    model.train()(images(8)).sum().backward()
    shake_(model)
    model.eval()
    detach_(model)
    assert_same(before, picture(model))


def test_buffers_of_what_is_trained_in_full_belong_to_the_adapter():
    model = small()
    attach_(model, lora(1), where="mlp", also="norm")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert state_of(model).recipe.also == tuple(f"norm.{key}" for key in ("weight", "bias", *statistics))
    model.train()(images(8))
    model.eval()
    moved = model.norm.running_mean.clone()
    assert moved.any()
    use_(model, None)
    assert not model.norm.running_mean.any()
    assert int(model.norm.num_batches_tracked) == 0
    use_(model, "default")
    assert torch.equal(model.norm.running_mean, moved)
    assert int(model.norm.num_batches_tracked) == 1


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images())


def test_several_adapters_and_no_number_lost():
    model = small()
    bare = outputs(model)
    seen = {}
    ways = {"a": lora(2), "b": lora(2), "c": nola(2, 6), "d": bias(), "e": lora(3), "f": full()}
    for seed, (name, method) in enumerate(ways.items()):
        attach_(model, method, name=name, also=r"^fc\." if name in "ace" else None)
        assert adapters(model)[0] == name
        assert torch.equal(outputs(model), bare)
        shake_(model, seed)
        seen[name] = outputs(model)
    assert len({float(item.sum()) for item in seen.values()}) == len(ways)
    for name in ["a", "f", None, "b", "e", None, "c", "d", "a", None, "a", "f", "b"]:
        use_(model, name)
        assert torch.equal(outputs(model), bare if name is None else seen[name]), name
        assert set(adapters(model)) == set(ways)
    detach_(model)
    assert torch.equal(outputs(model), bare)


def test_an_optimiser_stays_valid_between_adapters_of_one_recipe():
    model = small()
    attach_(model, lora(2), name="a", also=r"^fc\.")
    numbers = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.SGD(numbers, lr=0.1)
    shake_(model, 1)
    first = outputs(model)
    attach_(model, lora(2), name="b", also=r"^fc\.")  # a start of its own in the same parameters
    assert all(
        one is other for one, other in zip(numbers, [p for p in model.parameters() if p.requires_grad], strict=True)
    )
    assert not torch.equal(outputs(model), first)
    use_(model, "a")
    use_(model, None)
    use_(model, "b")
    model(images()).sum().backward()
    optimizer.step()
    stepped = outputs(model)
    use_(model, "a")
    assert torch.equal(outputs(model), first)
    use_(model, "b")
    assert torch.equal(outputs(model), stepped)


def test_a_second_start_is_the_first_one():
    model = small()
    attach_(model, lora(2, seed=8), name="a")
    start = {name: item.detach().clone() for name, item in model.named_parameters()}
    shake_(model)
    attach_(model, lora(2, seed=8), name="b")
    assert all(torch.equal(start[name], item) for name, item in model.named_parameters())
    other = small()
    attach_(other, lora(2, seed=9))
    assert not torch.equal(other.mlp[0].adapter.factors.a, model.mlp[0].adapter.factors.a)
    assert not torch.equal(model.mlp[0].adapter.factors.a[:, :8], model.mlp[2].adapter.factors.a[:, :8])


def test_the_start_of_lora():
    """A uniform in +-1/sqrt(in), as torch's Linear; B zero; the scale alpha over rank."""
    model = single(400, 30)
    attach_(model, lora(8, alpha=2.0))
    a, b = model[0].adapter.factors()
    assert not b.any()
    assert 0.045 < float(a.detach().abs().max()) <= 400**-0.5
    assert float(a.detach().var()) == pytest.approx(1 / (3 * 400), rel=0.1)
    with torch.no_grad():
        model[0].adapter.factors.b.fill_(1)
    assert torch.equal(model[0].adapter.factors()[1], torch.full((30, 8), 0.25))


def refused(model: nn.Module, call, match: str) -> None:
    """The call fails in one line, and the model does not show it."""
    before, output = picture(model), outputs(model)
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert_same(before, picture(model))
    assert torch.equal(outputs(model), output)


ERRORS = {
    "pattern": (lambda m: attach_(m, lora(), where="(", name="x"), r"regular expression as `where`; got '\('"),
    "also pattern": (lambda m: attach_(m, lora(), also="[", name="x"), r"regular expression as `also`"),
    "no match": (
        lambda m: attach_(m, lora(), where="nowhere", name="x"),
        r"'nowhere', which takes none; .*: stem, attn.in_proj_weight",
    ),
    "no door": (
        lambda m: attach_(m, lora(), where=nn.BatchNorm2d, name="x"),
        r"takes 'norm', and no BatchNorm2d can be adapted",
    ),
    "also no match": (lambda m: attach_(m, lora(), also="nothing", name="x"), r"'nothing', which takes none"),
    "both": (lambda m: attach_(m, lora(), where="mlp", also=r"mlp\.0", name="x"), r"mlp\.0, which is both"),
    "nothing": (lambda m: attach_(m, linear(), name="x"), r"something to train; got method linear alone"),
    "rank": (lambda m: attach_(m, lora(0), name="x"), r"rank of at least 1; got 0"),
    "use": (lambda m: use_(m, "there"), r"got 'there'|model with an adapter"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("adapted", [False, True])
def test_errors_leave_the_model_as_it_was(error, adapted):
    model = small()
    if adapted:
        attach_(model, nola(2, 5), name="first", also=r"^fc\.")
        shake_(model)
        model.fc.bias.requires_grad_(False)  # the user's own doing
    call, match = ERRORS[error]
    refused(model, lambda: call(model), match)


@pytest.mark.parametrize("off", [False, True])
def test_errors_after_other_adapters(off):
    model = small()
    attach_(model, lora(2), name="a", also="fc")
    shake_(model)
    attach_(model, nola(2, 5), name="b", also="fc")
    shake_(model)
    if off:
        use_(model, None)
    refused(model, lambda: attach_(model, lora(2), name="a"), r"a new adapter name; got 'a'")
    refused(model, lambda: attach_(model, lora(2), name="b"), r"a new adapter name; got 'b'")
    refused(model, lambda: use_(model, "c"), r"an adapter out of: .*; got 'c'")

    def fail():
        recipe = recipe_for(model, lora(2), None, "fc")
        return recipe, state_of_values(recipe)

    def state_of_values(recipe):
        raise InputError("a file", "half of one", "copy it again")

    refused(model, lambda: exchange_(model, "c", fail), r"half of one")
    if off:
        refused(model, lambda: merge_(model), r"a live adapter to merge; got none")


@pytest.mark.parametrize("recipe", ["same", "other"])
def test_numbers_that_do_not_fit_leave_the_model_as_it_was(recipe):
    """As a file might bring them: half-way through the change."""
    model = small()
    attach_(model, lora(2), name="a", also="fc")
    shake_(model)
    before, output = picture(model), outputs(model)
    held = copy.deepcopy(state_of(model).recipe)
    method = lora(2) if recipe == "same" else lora(3)
    wrong = copy.deepcopy(state_of(model).originals)

    def make():
        from scrimp.adapt.install import Recipe, Values

        return Recipe(method, held.names, held.also), Values(torch.zeros(7), wrong)

    with pytest.raises(RuntimeError, match="split"):
        exchange_(model, "b", make)
    assert_same(before, picture(model))
    assert torch.equal(outputs(model), output)
    assert adapters(model) == ("a",)


@pytest.mark.parametrize("call", [detach_, merge_, lambda model: use_(model, None)])
def test_a_bare_model_has_nothing_to_take_off(call):
    refused(model := small(), lambda: call(model), "a model with an adapter; got one without")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.body(self.table(torch.arange(5))))


def test_tied_weights():
    with torch.random.fork_rng():
        model = Tied()
    for where in ("table", "out", None, (nn.Embedding, nn.Linear)):
        match = r"weights of their own.*table\.weight, which is also out\.weight"
        refused(model, lambda where=where: attach_(model, lora(2), where=where), match)
    assert attach_(model, lora(2), where="body", also=r"^out\.weight$") == ["body"]
    assert state_of(model).recipe.also == ("table.weight",)  # one tensor, by its first name
    detach_(model)


def test_a_module_used_twice_is_adapted_once():
    """Several calls in a step: gradients add up."""
    with torch.random.fork_rng():
        layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert attach_(model, lora(2)) == ["0"]
    shake_(model)
    inputs = images().flatten(0, 2)
    a, b = layer.adapter.factors.a, layer.adapter.factors.b
    grads = torch.autograd.grad(model(inputs).sum(), (a, b))
    weight = layer.weight.detach() + b @ a
    reference = nn.functional.linear(nn.functional.linear(inputs, weight, layer.bias).tanh(), weight, layer.bias)
    for got, expected in zip(grads, torch.autograd.grad(reference.sum(), (a, b)), strict=True):
        torch.testing.assert_close(got, expected)


def test_weights_that_cannot_be_adapted_say_so():
    with torch.random.fork_rng():
        up = nn.Sequential(nn.ConvTranspose2d(3, 3, 2))
        normed = parametrizations.weight_norm(nn.Linear(3, 4))
        lazy = nn.Sequential(nn.LazyLinear(4))
    refused(up, lambda: attach_(up, lora(2), where="0"), "no ConvTranspose2d can be adapted; this model has 0")
    with pytest.raises(InputError, match=r"0\.weight without one; run it once"):
        attach_(lazy, lora(2))
    model = nn.Sequential(normed)
    attach_(model, lora(2))  # beside the forward pass a computed weight is as good as any
    shake_(model)
    with pytest.raises(InputError, match="0: a computed weight"):
        merge_(model)
    detach_(model)
    assert isinstance(normed.parametrizations.weight[0], nn.Module)
    with torch.random.fork_rng():
        attention = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
        parametrizations.spectral_norm(attention["attn"], "in_proj_weight")
    before = picture(attention)
    with pytest.raises(InputError, match=r"attn\.in_proj_weight with one"):
        attach_(attention, lora(2), where="in_proj")
    assert_same(before, picture(attention))


def test_a_part_of_that_name_is_an_error_that_leaves_nothing():
    model = small()
    model.mlp[2].adapter = nn.Identity()
    refused(model, lambda: attach_(model, lora(2)), "modules without a part named 'adapter'")


def test_a_copy_has_adapters_of_its_own():
    model = small()
    attach_(model, nola(2, 5), name="a")
    shake_(model, 1)
    attach_(model, lora(2), name="b", also="fc")
    shake_(model, 2)
    second = outputs(model)
    twin = copy.deepcopy(model)
    shake_(model, 3)
    assert torch.equal(outputs(twin), second)
    use_(twin, "a")
    detach_(model)
    shaken = outputs(twin)
    use_(twin, "b")
    assert torch.equal(outputs(twin), second)
    assert not torch.equal(shaken, second)
    detach_(twin)
    assert torch.equal(outputs(twin), outputs(model))


class Reader(nn.Module):
    """Reads its layer's weight by itself, so that the weight is to be changed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.layer.weight, self.layer.bias)


def test_pickled_models_keep_their_adapters():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Reader(nn.Linear(4, 3)))
    attach_(model, nola(2, 3), name="a")
    shake_(model, 1)
    attach_(model, lora(2), name="b")
    shake_(model, 2)
    inputs = images()[0, :2]
    wanted = model(inputs)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(inputs), wanted)
    use_(model, "a")
    use_(twin, "a")
    assert torch.equal(twin(inputs), model(inputs))
    detach_(twin)
    assert not twin[0]._forward_hooks
    assert type(twin[2].layer) is nn.Linear
    detach_(model)
    assert torch.equal(twin(inputs), model(inputs))


def test_hooks_of_an_unpickled_model_are_not_overwritten(monkeypatch):
    """Torch numbers hooks from 0 in each process; two of one number are one."""
    model = single(4, 4)
    for _ in range(50):
        model[0].register_forward_hook(print).remove()
    attach_(model, lora(2))
    shake_(model)
    stored = pickle.dumps(model)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # a fresh process
    twin = pickle.loads(stored)
    for _ in range(100):
        twin[0].register_forward_hook(lambda module, inputs, output: None)
    assert len(twin[0]._forward_hooks) == 101
    inputs = torch.ones(3, 4)
    assert torch.equal(twin(inputs), model(inputs))


def test_a_state_dict_holds_the_numbers():
    model, other = small(), small()
    attach_(model, lora(2), also="fc")
    shake_(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    attach_(other, lora(2, seed=3), also="fc")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(outputs(other), outputs(model))


class Stack(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(3))
        self.mode = mode

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            way = {"plain": block, "free": lambda x, b=block: checkpoint(b, x, use_reentrant=False),
                   "nested": lambda x, b=block: checkpoint(b, x, use_reentrant=True)}[self.mode]  # fmt: skip
            inputs = way(inputs)
        return inputs


def stack_gradients(mode: str, method) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Stack(mode)
    attach_(model, method)
    shake_(model)
    inputs = images().flatten()[:30].view(5, 6).requires_grad_()  # nested checkpoints ask for it
    model(inputs).square().sum().backward()
    return [item.grad for item in model.parameters() if item.requires_grad]


@pytest.mark.parametrize(
    "method", [METHODS["lora"], METHODS["nola"], METHODS["shared"]], ids=["lora", "nola", "shared"]
)
@pytest.mark.parametrize("mode", ["free", "nested"])
def test_checkpointing_gives_the_same_gradients(mode, method):
    plain, other = stack_gradients("plain", method), stack_gradients(mode, method)
    assert len(plain) == len(other) > 0
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(one, two)
        assert one.any()


def step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of a loss, in float32."""
    output = model(inputs)
    model.zero_grad()
    output.float().square().mean().backward()
    return output.detach(), {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["nola"]], ids=["lora", "nola"])
@pytest.mark.parametrize("way", ["autocast", torch.bfloat16, torch.float16], ids=str)
def test_half_precision(way, method):
    """The base in half precision or computing in it; the numbers and their gradients stay float32."""
    model, inputs = small(), images()
    if way != "autocast":
        model.to(way).float()  # weights that half precision holds
    attach_(model, method)
    shake_(model)
    wanted, exact = step(model, inputs)
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, grads = step(model, inputs)
    else:
        half = small().to(way)
        attach_(half, method)
        shake_(half)
        got, grads = step(half, inputs.to(way))
    assert got.dtype is (torch.bfloat16 if way == "autocast" else way)
    assert grads.keys() == exact.keys()
    assert len(grads) == 10
    assert float((got.float() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    for name, grad in grads.items():
        assert grad.dtype is torch.float32
        assert float((grad - exact[name]).norm()) < 0.1 * float(exact[name].norm()), name


def test_training_in_bfloat16_as_a_whole():
    """The numbers follow the model when it is cast afterwards, and their values are kept to the last bit."""
    model = small()
    attach_(model, nola(2, 5), name="a")
    shake_(model)
    model.to(torch.bfloat16)
    numbers = [item for item in model.parameters() if item.requires_grad]
    assert {item.dtype for item in numbers} == {torch.bfloat16}
    values = [item.detach().clone() for item in numbers]
    with torch.no_grad():
        wanted = model(images().bfloat16())
    use_(model, None)
    use_(model, "a")
    assert all(torch.equal(one, two) for one, two in zip(values, numbers, strict=True))
    with torch.no_grad():
        assert torch.equal(model(images().bfloat16()), wanted)


def test_models_without_storage():
    with torch.device("meta"):
        model = Small()
    before = [(name, item.shape) for name, item in model.named_parameters()]
    assert attach_(model, lora(2)) == WEIGHTS
    assert all(item.is_meta for item in model.parameters())
    assert model(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 4)
    detach_(model)
    assert [(name, item.shape) for name, item in model.named_parameters()] == before


class Chain(nn.Module):
    """A weight beside and one within."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = Reader(nn.Linear(8, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).tanh())


def compiled(backend: str, method) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Chain()
    attach_(model, method, name="a")
    shake_(model, 1)
    attach_(model, method, name="b")
    shake_(model, 2)
    inputs = images().flatten()[:30].view(5, 6)
    numbers = [item for item in model.parameters() if item.requires_grad]
    expected = {}
    for name in ("a", "b", None):
        use_(model, name)
        output = model(inputs)
        expected[name] = output.detach(), torch.autograd.grad(output.sum(), numbers) if name else ()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    quick = torch.compile(model, fullgraph=True, backend=counter)
    for name in ("a", "b", "a"):  # of one recipe: the compiled code stays valid
        use_(model, name)
        output = quick(inputs)
        torch.testing.assert_close(output.detach(), expected[name][0], rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(output.sum(), numbers)
        for got, wanted in zip(grads, expected[name][1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    use_(model, None)
    torch.testing.assert_close(quick(inputs), expected[None][0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.6 of its own tracing
@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["nola"]], ids=["lora", "nola"])
def test_compiles_into_one_graph(method):
    compiled("aot_eager", method)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["nola"]], ids=["lora", "nola"])
def test_compiles_by_inductor(method):
    compiled("inductor", method)

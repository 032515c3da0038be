"""The pixel transformer: exact probabilities, causality, and one step at a time equal to all at once."""

from __future__ import annotations

import pytest
import torch

from scrimp.jobs.pixels_generate import draws, generate, save_grid, steps_flops
from scrimp.jobs.pixels_model import PixelTransformer, as_images, as_sequence
from scrimp.jobs.pixels_output import DRAWS, OUTPUTS, bits
from scrimp.jobs.pixels_step import (
    CachedDecoder,
    LinearDecoder,
    RecomputingDecoder,
    make_decoder,
    plain_step,
)
from scrimp.primitives.errors import InputError

SHAPES = {"grey": (1, 5, 7), "colour": (3, 4, 3)}


def fresh(shape=(1, 5, 7), *, attention="linear", output="categorical", seed=0) -> PixelTransformer:
    """A model whose every parameter matters: norms and biases as well are drawn at random."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = PixelTransformer(shape, attention=attention, output=output, layers=3, heads=2, head_dim=8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def some_images(shape, count=4) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("name", OUTPUTS)
def test_probabilities_sum_to_one_and_draws_follow_them(name):
    output, generator = OUTPUTS[name], torch.Generator().manual_seed(0)
    outputs = torch.randn(5, output.width, generator=generator, dtype=torch.float64) * 3
    every = torch.arange(256).expand(5, 256)
    probabilities = (-output.nats(outputs[:, None].expand(5, 256, -1), every)).exp()
    assert probabilities.sum(1).sub(1).abs().max() < 1e-12
    count = 50_000
    uniforms = torch.rand(count, DRAWS, generator=generator)
    drawn = output.draw(outputs[0].float().expand(count, -1), uniforms)
    shares = torch.bincount(drawn, minlength=256) / count
    expected_noise = (probabilities[0] / count).sqrt().sum()
    assert (shares - probabilities[0]).abs().sum() < 1.5 * expected_noise


@pytest.mark.parametrize("name", OUTPUTS)
def test_extreme_outputs_give_finite_losses_and_gradients(name):
    output = OUTPUTS[name]
    outputs = torch.full((3, output.width), -40.0)
    outputs[:, :20] = torch.linspace(-30, 30, 20)
    outputs.requires_grad_()
    nats = output.nats(outputs, torch.tensor([0, 128, 255]))
    nats.sum().backward()
    assert nats.isfinite().all()
    assert outputs.grad.isfinite().all()
    edge = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.5, 0.5]])
    drawn = output.draw(outputs.detach(), edge)
    assert ((drawn >= 0) & (drawn <= 255)).all()


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_low_temperature_draws_the_likeliest(name):
    output, generator = OUTPUTS[name], torch.Generator().manual_seed(0)
    outputs = torch.randn(1, output.width, generator=generator)
    uniforms = torch.rand(200, DRAWS, generator=generator)
    warm, cold = (output.draw(outputs.expand(200, -1), uniforms, heat).unique().numel() for heat in (1.0, 1e-5))
    assert cold <= 2 < warm


def test_a_uniform_distribution_costs_eight_bits():
    nats = OUTPUTS["categorical"].nats(torch.zeros(1, 256), torch.tensor([7]))
    assert bits(float(nats)) == pytest.approx(8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pixels_and_images_turn_into_each_other(shape):
    images = some_images(shape)
    sequence = as_sequence(images)
    assert torch.equal(as_images(sequence, shape), images)
    assert torch.equal(sequence[:, : shape[0]], images[:, :, 0, 0])  # the channels of a pixel stand together


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_output_depends_on_earlier_pixels_only(attention, shape):
    model, images = fresh(shape, attention=attention), some_images(shape)
    with torch.no_grad():
        before = model(images)
        sequence = as_sequence(images).clone()
        sequence[:, 20] ^= 255
        after = model(as_images(sequence, shape))
    assert torch.equal(before[:, :21], after[:, :21])
    assert (before[:, 21:] - after[:, 21:]).abs().amax(2).gt(1e-6).all()


DECODERS = {
    "linear": lambda model, batch: LinearDecoder(model, batch),
    "softmax": lambda model, batch: CachedDecoder(model, batch),
    "softmax-plain": lambda model, batch: CachedDecoder(model, batch, attend=plain_step),
    "softmax-none": RecomputingDecoder,
    "linear-none": RecomputingDecoder,
}


@pytest.mark.parametrize("prefix", [0, 1, 17])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", DECODERS)
def test_step_by_step_equals_all_at_once(name, shape, prefix):
    model, images = fresh(shape, attention=name.partition("-")[0], output="logistics"), some_images(shape)
    sequence = as_sequence(images).long()
    with torch.inference_mode():
        expected = model(images)
        decoder = DECODERS[name](model, len(images))
        last = decoder.start()
        if prefix:
            decoder.prefill_(sequence[:, :prefix])
            last = sequence[:, prefix - 1]
        for place in range(prefix, model.tokens):
            assert decoder.place == place
            assert (decoder.step_(last) - expected[:, place]).abs().max() < 1e-4
            last = sequence[:, place]


@pytest.mark.parametrize("batch", [3, 20])
def test_rounded_weights_stay_close(batch):
    model, images = fresh(), some_images(SHAPES["grey"], batch)
    sequence = as_sequence(images).long()
    with torch.inference_mode():
        expected = model(images)
        decoder = make_decoder(model, batch, weights="int8")
        last, errors = decoder.start(), []
        for place in range(model.tokens):
            errors.append((decoder.step_(last) - expected[:, place]).abs().mean())
            last = sequence[:, place]
    assert 0 < torch.stack(errors).mean() < 0.02 * expected.std()


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_an_image_depends_on_its_number_not_on_its_batch(attention):
    model = fresh(attention=attention)
    whole = generate(make_decoder(model, 5), draws(range(5), model.tokens, seed=3))
    parts = [
        generate(make_decoder(model, len(part)), draws(part, model.tokens, seed=3)) for part in ([0, 1], [2, 3, 4])
    ]
    assert torch.equal(whole, torch.cat(parts))
    other = generate(make_decoder(model, 5), draws(range(5), model.tokens, seed=4))
    assert not torch.equal(whole, other)
    recomputed = generate(make_decoder(model, 5, cache="none"), draws(range(5), model.tokens, seed=3))
    assert torch.equal(whole, recomputed)


def test_a_known_beginning_is_kept():
    model, images = fresh(SHAPES["colour"]), some_images(SHAPES["colour"])
    known = as_sequence(images)[:, :18]
    made = generate(make_decoder(model, 4), draws(range(4), model.tokens, seed=0), known=known)
    assert torch.equal(as_sequence(made)[:, :18], known)
    assert not torch.equal(made, images)


def test_the_state_is_constant_and_the_cache_is_not():
    states = [LinearDecoder(fresh((1, side, 7)), 2).states[0] for side in (5, 50)]
    small, large = (state.kv.numel() + state.normaliser.numel() for state in states)
    assert small == large == 2 * 2 * 8 * 9
    small, large = (CachedDecoder(fresh((1, side, 7), attention="softmax"), 2).cache.numel() for side in (5, 50))
    assert large == 10 * small


def test_the_flops_of_a_step_grow_with_softmax_only():
    counts = {}
    for attention in ("linear", "softmax"):
        for given in (0, 30):
            decoder = make_decoder(fresh(attention=attention), 1)
            counts[attention, given] = steps_flops(decoder, given=given).value / (35 - given)
    assert counts["linear", 0] == pytest.approx(counts["linear", 30])
    assert counts["softmax", 30] > counts["softmax", 0]


def test_too_many_pixels_say_so():
    with torch.random.fork_rng([]), pytest.raises(InputError, match="--size 32"):
        PixelTransformer((3, 224, 224))


def test_the_picture_is_a_grid(tmp_path):
    from PIL import Image

    save_grid(some_images((1, 5, 7), 5), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 8 + 1, 2 * 6 + 1)

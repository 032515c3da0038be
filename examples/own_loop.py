"""A training loop of one's own, with a sampler in it and a receipt at its end.

python examples/own_loop.py --sampling uniform   # the baseline, on the built-in images
python examples/own_loop.py                      # importance sampling by history, at the same number of steps
python examples/own_loop.py --data PHOTOS        # a folder of class folders instead
scrimp report runs/own                           # both ways side by side
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from scrimp.data import load_images, normalise
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak, count_flops
from scrimp.receipts import Receipt, save_receipt
from scrimp.select import RoundSampler, gradient_norm_bound, history, uniform

POLICIES = {"uniform": uniform, "history": history()}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="builtin")
parser.add_argument("--sampling", choices=POLICIES, default="history")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="runs/own", help="the receipt goes into a folder of its own in this one")
args = parser.parse_args()

data = load_images(args.data)
torch.manual_seed(args.seed)
layers = [nn.Conv2d(data.train.shape[0], 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, len(data.classes)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
sampler = RoundSampler(len(data.train), 64, policy=POLICIES[args.sampling], seed=args.seed)
loader = DataLoader(data.train, batch_sampler=sampler, collate_fn=lambda batch: batch)
steps = args.epochs * len(sampler)


def logits_of(images):
    return model(normalise(images, data.mean, data.std))


some = torch.arange(64)  # one step is counted apart: counting is slow and must not share a pass with the clock
step = count_flops(lambda: cross_entropy(logits_of(data.train.batch(some)), data.train.labels[some]).backward())
with ResidentPeak() as memory, EnergyWindow() as energy:
    wall, cpu = time.perf_counter(), time.process_time()
    for done in range(args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - done / args.epochs)
        for images, labels, _ in loader:
            logits = logits_of(images)
            losses = cross_entropy(logits, labels, reduction="none")
            loss = sampler.weigh(losses, gradient_norm_bound(logits, labels))  # instead of losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
with torch.no_grad():
    rows = torch.arange(len(data.test)).split(256)
    guesses = torch.cat([logits_of(data.test.batch(each)).argmax(1) for each in rows])

cost = Cost(
    seconds=Reading(wall, "wall clock of the training loop"),
    cpu_seconds=Reading(cpu, "process CPU time of the training loop, all threads"),
    flops=Reading(step.value * steps, f"{step.how}; one step, times the steps", step.missed),
    peak_bytes=memory.reading,
    joules=energy.reading,
    samples=Reading(steps * 64, "images through forward and backward"),
    labels=Reading(len(data.train), "training images with a label"),
)
gave = {"test_accuracy": (guesses == data.test.labels).float().mean().item()}
ways = {"name": "own loop", "way": args.sampling, "baseline": args.sampling == "uniform", "seed": args.seed}
receipt = Receipt(kind="run", **ways, quality=gave, cost=cost, config=vars(args), notes={"data": data.name})
path = save_receipt(receipt, f"{args.out}/{args.sampling}-{args.seed}/receipt.json")
print(f"{'test_accuracy':15}{gave['test_accuracy']:10.4f}")
for name, reading in cost.to_dict().items():
    print(f"{name:15}{'-' if reading['value'] is None else format(reading['value'], '.4g'):>10}  {reading['how']}")
print(f"receipt: {path}")

"""A pretraining loop of one's own: constrained mean shift on a timm backbone, without labels, and a receipt at its end.

python examples/own_pretraining.py                                  # resnet10t on the built-in images
python examples/own_pretraining.py --data PHOTOS --model resnet18   # a folder of class folders instead
scrimp probe runs/own-encoder/weights.safetensors builtin           # what the features are worth
"""

import argparse
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from scrimp import represent
from scrimp.data import WEAK, load_images, normalise, standardise, strong_for, view_of
from scrimp.jobs.encoders import encoder_metadata
from scrimp.meter import Cost, Reading, count_flops
from scrimp.receipts import Receipt, save_receipt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="builtin")
parser.add_argument("--model", default="resnet10t", help="any timm name that takes images of this size")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="runs/own-encoder", help="where weights and receipt go")
args = parser.parse_args()

data, generator = load_images(args.data), torch.Generator().manual_seed(args.seed)
torch.manual_seed(args.seed)
channels, size, _ = data.train.shape
count, dim, batch = len(data.train), 64, min(128, len(data.train))
backbone = timm.create_model(args.model, num_classes=0, in_chans=channels)
online = nn.Sequential(backbone, represent.projector(backbone.num_features, dim=dim))
head, target = represent.predictor(dim), represent.target_of(online)
memory, before = (represent.Memory(max(batch, count // 4), dim) for _ in range(2))
cache = represent.EmbeddingCache(count, dim)  # the last embedding of every image, for the next pass
optimizer = torch.optim.AdamW([*online.parameters(), *head.parameters()], lr=2e-3)


def backward(rows):
    views = [view_of(data.train.batch(rows), view, generator=generator) for view in (strong_for(size), WEAK)]
    strong, weak = (standardise(view, data.mean, data.std) for view in views)
    with torch.no_grad():
        there = target(weak)
    memory.push_(there)  # first, so that each target is its own nearest neighbour
    earlier = cache.read(rows)
    before.push_(earlier)  # row for row beside the memory of targets
    cache.write_(rows, there)
    bound = represent.earlier_views(earlier, before)
    represent.constrained_mean_shift_loss(head(online(strong)), there, memory, constraint=bound, k=5).backward()


@torch.no_grad()
def features_of(images):
    rows = torch.arange(len(images)).split(256)
    return torch.cat([backbone(normalise(images.batch(each), data.mean, data.std)) for each in rows])


wall, steps = time.perf_counter(), 0
for epoch in range(args.epochs):
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 * (1 - epoch / args.epochs)
    for rows in torch.randperm(count, generator=generator)[: count // batch * batch].split(batch):
        represent.follow_(target, online)
        optimizer.zero_grad()
        backward(rows)
        optimizer.step()
        steps += 1
wall = time.perf_counter() - wall
backbone.eval()
found, asked = features_of(data.train), features_of(data.test)
right = represent.knn_accuracy(found, data.train.labels, asked, data.test.labels, k=min(20, count))
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)
about = {"channels": channels, "size": size, "mean": data.mean, "std": data.std, "dim": found.shape[1]}
save_file(backbone.state_dict(), out / "weights.safetensors", encoder_metadata(args.model, **about))

online.train()  # one step is counted when all is done, since it moves the memory
flops = count_flops(lambda: backward(torch.arange(batch)))
spent = Reading(flops.value * steps, f"{flops.how}; one step, times the steps", flops.missed)
seen = Reading(steps * batch, "images through forward and backward")
cost = Cost(seconds=Reading(wall, "wall clock of the training loop"), flops=spent, samples=seen)
settings = {"seed": args.seed, "quality": {"knn20_accuracy": right}, "config": vars(args)}
path = save_receipt(Receipt("run", "own encoder", "constrained", cost=cost, **settings), out / "receipt.json")
print(f"20-NN accuracy {right:.4f}, {spent.value:.4g} FLOPs\nreceipt: {path}")

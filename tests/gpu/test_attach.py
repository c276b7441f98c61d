"""Training that shrinks on a CUDA device, whose convolutions shorten float32 by default."""

import pytest
import torch
from torch import nn

import tersor
from tersor.train.structure import find_structure
from tests.data.zoo import load_fashion, load_resnet20

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
STEPS, EVERY = 60, 2


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def model() -> nn.Module:
    return load_resnet20().cuda().train()


def test_structure_is_that_of_the_cpu(model: nn.Module) -> None:
    images = load_fashion()[0].images[:8]
    wanted = find_structure(load_resnet20(), images)
    found = find_structure(model, images)
    assert found.groups.keys() == wanted.groups.keys()
    assert {h.name for h in found.held} == {h.name for h in wanted.held}


@pytest.mark.parametrize("algorithm", ["regrow", "ramp", "prox"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_ends_small(model: nn.Module, algorithm: str, scaled: bool) -> None:
    train = load_fashion()[0]
    images, labels = train.images.cuda(), train.labels.cuda()
    structure = find_structure(model, train.images[:8])
    counts = {name: g.units // 2 for name, g in structure.groups.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=scaled)
    shrinker = tersor.train.attach(
        model,
        optimizer,
        train.images[:8],
        counts=counts,
        total_steps=STEPS,
        algorithm=algorithm,
        schedule=tersor.train.Schedule(total_steps=STEPS, every=EVERY),
    )
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    for step in range(STEPS):
        rows = torch.arange(64, device="cuda") + (step * 64) % 1024
        with torch.autocast("cuda", torch.float16, enabled=scaled):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    small, report = shrinker.finish()
    assert report.difference <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.4 * 272_000
    assert all(p.is_cuda for p in small.parameters())
    with torch.no_grad():
        assert torch.isfinite(small.eval()(images[:32])).all()

from torch import Tensor, nn


def test_the_packed_checkpoint_names_the_packed_images(
    resnet20: nn.Module, images: dict[str, Tensor]
) -> None:
    found = resnet20(images["test"]).argmax(1) == images["test_labels"]
    # 94.7 % on all 10,000 test images; 800 of them give a standard error of 0.8 points.
    assert float(found.double().mean()) > 0.92

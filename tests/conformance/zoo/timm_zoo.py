"""timm: the smallest variants of its families, at the smallest size that most of them take."""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from tests.conformance.zoo.entry import ZooModel, built, picture
from tests.conformance.zoo.torchvision_shim import import_torchvision

SIZE = 64
# Block attention on an 8 x 8 grid, a table of positions made for 7 x 7, unpadded stems; and norms
# over one or two values, which make float32 rounding large.
SIZES = {
    "halonet26t": 256,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 139,
    "inception_v3": 139,
    "inception_v4": 139,
    "efficientvim_m1": 128,
    "shvit_s1": 128,
    "mobilenetv4_conv_small": 128,
    "mobilenetv4_hybrid_medium_075": 128,
    "selecsls42": 128,
}
# Networks that are told their size when they are built.
TOLD = (
    *("lambda_resnet26t", "halonet26t", "botnet26t_256", "beit_base_patch16_224"),
    *("cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "deit_tiny_distilled_patch16_224"),
    *("efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "eva02_tiny_patch14_224"),
    *("gcvit_xxtiny", "hiera_tiny_224", "levit_128s", "coatnet_nano_rw_224"),
    *("maxvit_pico_rw_256", "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224"),
    *("mvitv2_tiny", "nest_tiny", "pit_ti_224", "sequencer2d_s"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
    *("tnt_s_patch16_224", "twins_svt_small", "twins_pcpvt_small", "visformer_tiny"),
    *("vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "samvit_base_patch16_224"),
    *("vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224", "flexivit_small"),
    *("vit_tiny_r_s16_p8_224", "qwen3_vit_88m"),
)
CNNS = (
    *("lambda_resnet26t", "halonet26t", "botnet26t_256", "repvgg_a0", "gcresnext26ts"),
    *("mobileone_s0", "convmixer_768_32", "cs3darknet_s", "cspresnet50", "cspnext_tiny"),
    *("densenet121", "dla34", "dpn48b", "efficientnet_b0", "mixnet_s", "fasternet_t0"),
    *("ghostnet_050", "ghostnetv2_100", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small"),
    *("inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4"),
    *("lcnetv2_small", "mambaout_femto", "convformer_s18", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "nasnetalarge", "pnasnet5large", "nfnet_l0", "rdnet_tiny"),
    *("regnety_002", "regnetz_005", "repghostnet_050", "res2net50_48w_2s", "resnest14d"),
    *("resnet18", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18"),
    *("skresnet18", "starnet_s050", "tresnet_m", "vgg11_bn", "ese_vovnet19b_slim"),
    *("legacy_xception", "xception41", "convnext_atto", "convnextv2_atto"),
    *("focalnet_tiny_srf", "repvit_m0_9", "csatv2", "cpubone_t0", "poolformer_s12"),
)
TRANSFORMERS = (
    *("beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny"),
    *("crossvit_tiny_240", "davit_tiny", "deit_tiny_distilled_patch16_224"),
    *("edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1"),
    *("efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8"),
    *("gcvit_xxtiny", "hiera_tiny_224", "hieradet_small", "iformer_t", "levit_128s"),
    *("lowformer_b0", "coatnet_nano_rw_224", "maxvit_pico_rw_256", "caformer_s18"),
    *("mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224", "mobilenetv4_hybrid_medium_075"),
    *("mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small"),
    *("pit_ti_224", "pvt_v2_b0", "sequencer2d_s", "shvit_s1", "swiftformer_xs"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
    *("tiny_vit_5m_224", "tnt_s_patch16_224", "twins_svt_small", "twins_pcpvt_small"),
    *("visformer_tiny", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224"),
    *("samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224"),
    *("flexivit_small", "vit_tiny_r_s16_p8_224", "naflexvit_base_patch16_gap"),
    "qwen3_vit_88m",
)


def entries() -> Iterator[ZooModel]:
    """One entry a network; each name is a family of its own."""
    for kind, names in (("cnn", CNNS), ("transformer", TRANSFORMERS)):
        for name in names:
            inputs = picture(SIZES.get(name, SIZE))
            yield ZooModel(
                name=f"timm/{name}",
                family=name.partition("_")[0],
                source="timm",
                kind=kind,
                build=built(partial(_make, name), inputs),
                inputs=inputs,
            )


def _make(name: str) -> nn.Module:
    if find_spec("torchvision"):
        import_torchvision()  # what timm imports has to import
    import timm

    told: dict[str, Any] = {"img_size": SIZES.get(name, SIZE)} if name in TOLD else {}
    model: nn.Module = timm.create_model(name, pretrained=False, **told)
    return model

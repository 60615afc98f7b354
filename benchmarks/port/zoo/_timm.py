"""The smallest model of each of sixty families of timm, at the smallest images that it takes."""

from functools import partial

from torch import nn

from ._entry import Entry, images
from ._operators import declare_operators

__all__ = ["timm"]

# Model -> side of its images.
_SIDES = {
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "convit_tiny": 224,
    "crossvit_tiny_240": 240,
    "cs3darknet_focus_s": 64,
    "davit_tiny": 64,
    "deit_tiny_patch16_224": 224,
    "dla46x_c": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "ese_vovnet19b_slim_dw": 64,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "gcvit_xxtiny": 224,
    "ghostnet_050": 64,
    "gmlp_ti16_224": 224,
    "halonet_h1": 256,
    "hgnetv2_b0": 64,
    "hiera_tiny_224": 224,
    "hrnet_w18_small": 64,
    "inception_next_atto": 64,
    "lcnet_035": 64,
    "legacy_seresnet18": 64,
    "levit_128s": 224,
    "mobilevit_xxs": 64,
    "mvitv2_tiny": 224,
    "nest_tiny": 224,
    "pit_ti_224": 224,
    "poolformerv2_s12": 64,
    "pvt_v2_b0": 64,
    "repvit_m1": 64,
    "resnest14d": 64,
    "resnetv2_18": 64,
    "rexnet_100": 64,
    "sequencer2d_s": 224,
    "starnet_s050": 64,
    "swiftformer_xs": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "test_byobnet": 64,
    "test_coatnet": 160,
    "test_convnext": 64,
    "test_efficientnet": 64,
    "test_mambaout": 64,
    "test_nfnet": 64,
    "test_resnet": 64,
    "test_vit": 160,
    "test_vit_relpos": 160,
    "tiny_vit_5m_224": 64,
    "tnt_s_legacy_patch16_224": 224,
    "twins_svt_small": 224,
    "visformer_tiny": 224,
    "vit_tiny_patch16_dinov3_qkvb": 256,
    "vit_tiny_r_s16_p8_224": 224,
    "volo_d1_224": 224,
    "xcit_nano_12_p16_224": 224,
}


def timm() -> list[Entry]:
    """Models of ten classes."""
    return [Entry("timm", name, partial(_build, name), images(side)) for name, side in _SIDES.items()]


def _build(name: str) -> nn.Module:
    declare_operators()  # timm imports torchvision
    import timm as library

    return library.create_model(name, pretrained=False, num_classes=10)

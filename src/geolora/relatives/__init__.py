"""GeoLoRA's relatives as optimizers, one file each; the mathematics is in `methods/`."""

from geolora.relatives.lora_pro import LoRAPro
from geolora.relatives.lora_sb import LoRASB
from geolora.relatives.rac_lora import RACLoRA
from geolora.relatives.riemannian import RiemannianAdamW

__all__ = ["LoRAPro", "LoRASB", "RACLoRA", "RiemannianAdamW"]

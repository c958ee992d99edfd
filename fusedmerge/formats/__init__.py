"""Adapter files: PEFT and the layouts of LoRA-MoE projects. Importing this package needs no torch."""

from fusedmerge.formats.lora import Adapter as Adapter
from fusedmerge.formats.lora import Factors as Factors
from fusedmerge.formats.moe import MoECheckpoint as MoECheckpoint
from fusedmerge.formats.moe import read_moe as read_moe
from fusedmerge.formats.peft import read_peft as read_peft
from fusedmerge.formats.peft_model import read_peft_model as read_peft_model

__all__ = ["Adapter", "Factors", "MoECheckpoint", "read_moe", "read_peft", "read_peft_model"]

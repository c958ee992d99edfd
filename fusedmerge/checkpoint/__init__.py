"""The offline merge: a mixture of adapters into a Hugging Face checkpoint."""

from fusedmerge.checkpoint.merge import merge_checkpoint, parse_adapter_argument

__all__ = ["merge_checkpoint", "parse_adapter_argument"]

"""Adapter files: PEFT and the layouts of LoRA-MoE projects."""

"""Train a LoRA-Switch model with transformers' Trainer, save its experts, and load them again.

    python examples/train_lora_switch.py --model DIR --text FILE --out DIR

Without --model and --text: a small random Llama on the bytes of this repository's documents, to see it run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fusedmerge as fm

CONFIG = fm.moe.LoRAMoEConfig(method="lora_switch", num_experts=8, top_k=2, r=8, lora_alpha=16, lora_dropout=0.05)


def base(directory: str | None) -> torch.nn.Module:
    if directory is not None:
        return AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
    )


def windows(directory: str | None, text: str | None, length: int) -> list[dict[str, torch.Tensor]]:
    if text is not None:
        content = Path(text).read_text()
    else:
        content = "".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    tokens = AutoTokenizer.from_pretrained(directory)(content)["input_ids"] if directory is not None else list(content.encode())
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": torch.tensor(tokens[s : s + length]), "labels": torch.tensor(tokens[s : s + length])} for s in starts]


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face checkpoint directory with its tokenizer")
    parser.add_argument("--text", help="a text file to train on")
    parser.add_argument("--out", default="trained-lora-switch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    arguments = parser.parse_args(argv)

    model = fm.moe.inject(base(arguments.model), CONFIG, seed=0)
    settings = TrainingArguments(
        output_dir=arguments.out, max_steps=arguments.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=5e-3, warmup_steps=arguments.steps // 10, lr_scheduler_type="cosine", max_grad_norm=1.0, seed=0,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=torch.cuda.is_available(),
        save_steps=max(1, arguments.steps // 2), logging_steps=max(1, arguments.steps // 10), report_to=[],
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=windows(arguments.model, arguments.text, arguments.length))
    # The balance loss is part of outputs.loss: the mean over accumulated batches must be taken of all of it.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=arguments.resume)

    fm.moe.save(model, Path(arguments.out) / "experts")
    again = fm.moe.load(base(arguments.model), Path(arguments.out) / "experts").to(model.device).eval()
    tokens = trainer.train_dataset[0]["input_ids"][None].to(model.device)
    with torch.no_grad():
        same = torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    print(f"saved {arguments.out}/experts; loaded again: the same logits: {same}")
    return trainer


if __name__ == "__main__":
    main()

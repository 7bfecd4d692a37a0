"""A Trainer that is stopped and goes on from its checkpoint trains as one that was not, bit for bit."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import torch_fused_lora as tfl

STEPS, STOPPED = 4, 2


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.randint(32, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class CountSteps(TrainerCallback):
    count = 0

    def on_step_end(self, *_, **__):
        self.count += 1


def adapters(folder, device: torch.device, resume: str | None = None) -> dict[str, torch.Tensor]:
    """What `STEPS` steps make of them, dropout drawn in each; checkpoints go to ``folder``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.05, target_modules="all-linear"))
    assert len(tfl.patch_peft(model).patched) == 7
    assert len(tfl.patch_norms(model).patched) == 3
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=STOPPED,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    taken = CountSteps()
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[taken])
    assert trainer.args.device.type == device.type
    trainer.train(resume_from_checkpoint=resume)
    assert taken.count == (STEPS - STOPPED if resume else STEPS)
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_runs_are_identical_and_a_resumed_one_too(device, tmp_path):
    whole = adapters(tmp_path / "whole", device)
    assert any(not torch.equal(p, torch.zeros_like(p)) for name, p in whole.items() if "lora_B" in name)
    assert_equal(adapters(tmp_path / "again", device), whole)
    resumed = adapters(tmp_path / "resumed", device, str(tmp_path / "whole" / f"checkpoint-{STOPPED}"))
    assert_equal(resumed, whole)

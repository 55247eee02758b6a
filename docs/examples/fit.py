"""Fit a collaborative RNN to sequences, evaluate it, save it, load it."""

import tempfile
from pathlib import Path

import numpy as np

import crnn_np

# 40 users who walk round the same 12 places, each with a stride of their own
rng = np.random.default_rng(0)
strides = rng.integers(1, 6, 40)
noise = rng.random((40, 120)) < 0.1
walks = (np.arange(120) * strides[:, None] + rng.integers(0, 12, (40, 120)) * noise) % 12
train, heldout = crnn_np.cut_tail(crnn_np.from_sequences(walks), np.full(40, 12))

model = crnn_np.CollaborativeRNN(preset="authors", hidden_size=8, epochs=60, batch=8)
model.fit(train)
scores = model.evaluate(train, heldout, n=3)
print(model)
print(f"error {scores['nll']:.3f} nats, uniform {np.log(12):.3f}")
print(f"Recall@3 {scores['recall@3']:.3f}, uniform {3 / 12:.3f}")
assert scores["nll"] < 2.0

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "walks.model"
    model.save(path)
    again = crnn_np.CollaborativeRNN.load(path)
assert again.evaluate(train, heldout, n=3) == scores

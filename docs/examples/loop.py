"""The training loop in your own hands: settings, reports, and a stopping rule of your own."""

import numpy as np

import crnn_np

rng = np.random.default_rng(1)
walks = (np.arange(100) * rng.integers(1, 6, 30)[:, None]) % 12
log = crnn_np.from_sequences(walks)

spec = crnn_np.Spec(hidden_size=8, cell="tanh")
rule = crnn_np.Rule(learning_rate=0.01, eps=1e-2)
plan = crnn_np.Plan(batch=10, window=32, epochs=200)

for report in crnn_np.epochs(spec, rule, plan, log):
    if report.epoch % 5 == 1:
        rate = report.events / report.seconds
        print(f"epoch {report.epoch}: {report.loss:.3f} nats, {rate:,.0f} events per second")
    if report.loss < 0.5:
        break

norm = np.linalg.norm(report.params.W_out)
print(f"stopped after epoch {report.epoch}; |W_out| = {norm:.2f}")
assert report.loss < 0.5

"""The GPU programme: what a machine with one NVIDIA GPU is asked, once, in under ten minutes.

``python -m benchmarks.gpu --output benchmarks/results/gpu.json`` (``pip install 's2s[cuda]'`` first)
checks that the fast ways through a layer give what the plain one gives, measures the machine's floors,
training steps, single layers and beam search under different XLA flags, and writes gpu.json and,
beside it, the same in tables as gpu.md.
"""

"""Quantize a model, open the artifact, and compare its vectors with the model's.

Run: python examples/own_model.py [MODEL] [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import gteopt

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "artifacts/example")

manifest = gteopt.quantize(model, "rtn-int8", folder)
share = manifest.weight_bytes / manifest.base.weight_bytes
print(f"{folder}: {manifest.weight_bytes / 1e6:.1f} MB, {share:.0%} of {model}")

texts = ["How do plants make energy?", "Photosynthesis turns light into chemical energy."]
base, variant = gteopt.load(model).encode(texts), gteopt.load(folder).encode(texts)
print("cosine to the model's vectors:", (base * variant).sum(axis=1).round(4))

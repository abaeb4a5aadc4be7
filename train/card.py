"""The model card of a finished model."""

import json

from train.job import StepRecord, TrainJob


def model_card(job: TrainJob, last: StepRecord) -> str:
    """Markdown: what was fused into what, how, and the last step's losses."""
    origin = f"{job.model.hub} (revision {job.model.revision})" if job.model.hub else "a local model"
    sources = "\n".join(f"- {name}" for name in job.sources) or "- none"
    losses = {"loss": last.loss, "loss_clm": last.loss_clm, "loss_fusion": last.loss_fusion}
    shown = "\n".join(f"| {name} | {value:.4f} |" for name, value in losses.items() if value is not None)
    settings = json.dumps(job.config.result_settings(), indent=2)
    return f"""---
library_name: transformers
tags: [knowledge-fusion, probabilistic-token-alignment]
---
# {job.model.name}, fused

Trained with ptafuse: knowledge fusion of language models by Probabilistic Token Alignment (PTA-LLM, arXiv 2509.17276).
Weights are float32. The license of the target model and the terms of the source models apply.

Target: {job.model.name}, {origin}.

Sources:
{sources}

Fingerprint of the training job: `{job.fingerprint}`. Optimizer steps: {last.step}. Tokens: {last.num_tokens}.

| last step | nats per token |
| --- | --- |
{shown}

```json
{settings}
```
"""

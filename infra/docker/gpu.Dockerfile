# Workers with GPUs: vLLM for the logits stage, FlashAttention 2 for training.
#   docker build --file infra/docker/gpu.Dockerfile --tag REGISTRY/ptafuse-gpu:TAG .
# CUDA_VERSION is that of torch.version.cuda (the build checks it); the compiler stays in the image, since vLLM's kernels
# are compiled where they run. PYTHON_VERSION is cpu.Dockerfile's.
ARG CUDA_VERSION=13.0.1
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu22.04
ARG CUDA_VERSION
ARG PYTHON_VERSION=3.11.13
ARG UV_VERSION=0.9.7
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu removes old versions from its archive, so none is pinned; wget is for KubeRay's probes, rsync for Ray's launcher.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-pip rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "uv==${UV_VERSION}" \
    && useradd --create-home --uid 1000 ray

ENV UV_PYTHON_INSTALL_DIR=/opt/python VIRTUAL_ENV=/opt/ptafuse PATH=/opt/ptafuse/bin:${PATH} UV_NO_CACHE=1
RUN uv venv --python "${PYTHON_VERSION}" "${VIRTUAL_ENV}"
WORKDIR /home/ray/ptafuse

# vLLM requires older transformers, numba and numpy than requirements.txt. Of that file, only packages that all nodes must
# share are kept: Ray, torch, and what reads and writes the run directory. Manifests record the versions of each shard.
COPY requirements.txt pyproject.toml README.md LICENSE ./
RUN grep -E '^(ray|torch|pyarrow|fsspec|s3fs|safetensors|pydantic)==' requirements.txt > constraints.txt
COPY pipeline pipeline
COPY stages stages
COPY train train
RUN uv pip install --constraint constraints.txt ".[vllm,peft]" \
    && python -c "import torch; cuda = torch.version.cuda; assert '${CUDA_VERSION}'.startswith(cuda), cuda"

# From source, against the torch above. Ampere and Hopper; Ada runs Ampere's kernels, Blackwell needs 100. Its setup.py reads
# FLASH_ATTN_CUDA_ARCHS, not TORCH_CUDA_ARCH_LIST; without it, it builds for all architectures, in 10 hours of CPU time. Each
# of MAX_JOBS compilers runs NVCC_THREADS architectures at once, with about 5 GB each. SDPA is used where it is missing.
ARG FLASH_ATTN_VERSION=2.8.3
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
ARG NVCC_THREADS=2
RUN uv pip install setuptools wheel ninja packaging psutil \
    && FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS}" \
        MAX_JOBS=${MAX_JOBS} NVCC_THREADS=${NVCC_THREADS} \
        uv pip install --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"

USER 1000
CMD ["ptafuse", "--help"]

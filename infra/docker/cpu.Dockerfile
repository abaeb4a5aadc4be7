# The head, the driver and workers without a GPU: exactly the versions of requirements.txt.
#   docker build --file infra/docker/cpu.Dockerfile --tag REGISTRY/ptafuse-cpu:TAG .
# Ray refuses a cluster whose nodes differ in Python's or Ray's version: both images take them from the same files.
ARG PYTHON_VERSION=3.11.13
FROM python:${PYTHON_VERSION}-slim-bookworm

# KubeRay's probes call wget inside of the container. Ray's cluster launcher works in the head's container: ssh and rsync to
# the workers, tmux for `ray exec --tmux`, sudo for files that it copied in. Debian removes old versions: none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync sudo tmux wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ray \
    && echo "ray ALL=(root) NOPASSWD: /bin/chown, /usr/bin/chown" > /etc/sudoers.d/ray
WORKDIR /home/ray/ptafuse

# Before the code is copied, so that a changed line of code does not download everything again.
COPY requirements.txt ./
# The index of CPU builds is PyTorch's; PyPI's torch would bring several GB of CUDA that no node here has.
RUN pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir --requirement requirements.txt
# boto3 lets Ray's autoscaler start machines on AWS. Its version must match the botocore that requirements.txt pins.
ARG BOTO3_VERSION=1.43.117
RUN pip install --no-cache-dir "boto3==${BOTO3_VERSION}" --constraint requirements.txt

COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray pipeline pipeline
COPY --chown=ray stages stages
COPY --chown=ray train train
RUN pip install --no-cache-dir --no-deps .
# Once for all workers, which start twice as fast with bytecode; some packages carry files for other Python versions.
RUN python -m compileall -q -j 0 /usr/local/lib || true

USER 1000
# Workers find ptafuse installed; the image starts no server itself.
CMD ["ptafuse", "--help"]

# An image for NVIDIA GPUs with the package, the launchers and the presets.
#
#   docker build --tag scaledistill .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/workspace" scaledistill distill --help
#
# It runs as user 10001, which must be able to write the mounted folder.
#
# BASE         image with CUDA, of the version that torch is built for; "devel" has nvcc, which some of
#              DeepSpeed's operators need
# TORCH_INDEX  package index with torch's wheels for another CUDA version (default: pip's own)
# EXTRAS       extras of the package to install
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

# Triton compiles its launchers with gcc and Python's headers. The distribution of the base decides
# about versions.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends \
    g++ gcc ninja-build openssh-client pdsh python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  PIP_NO_CACHE_DIR=1

WORKDIR /opt/scaledistill
ARG TORCH_INDEX=""
COPY constraints.txt ./
# torch first: DeepSpeed's build imports it, hence no build isolation below.
RUN pip install --constraint constraints.txt setuptools wheel \
  && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
ARG EXTRAS=eval,tracking
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY scaledistill scaledistill
COPY configs configs
COPY launch launch
COPY tools tools
RUN pip install --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]"

# A fixed id, so that a volume can be given to it: chown 10001.
RUN useradd --create-home --uid 10001 distill \
  && install --directory --owner distill --group distill /workspace
USER 10001
WORKDIR /workspace
ENTRYPOINT ["scaledistill"]
CMD ["--help"]

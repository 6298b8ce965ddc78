# Everything that megachameleon can use of a GPU, built from source: Transformer Engine's torch extension, apex, Liger.
#
# NEVER BUILT YET: no machine with nvcc was at hand. Every command is from the packages' own build files; the tag of the
# base image is not checked.
#
#     docker build --tag megachameleon .
#     docker run --rm --gpus all --ipc=host megachameleon make test-gpu VENV=/opt/venv
#     docker run --rm --gpus all --ipc=host -v /data:/data -v /runs:/runs megachameleon \
#         torchrun --standalone --nproc-per-node 8 tools/train.py /data/run.yaml
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}

ARG CUDA_ARCHITECTURE=9.0
ARG JOBS=8
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    CUDA_HOME=/usr/local/cuda \
    CUDA_DEVICE_MAX_CONNECTIONS=1 \
    TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURE} \
    MAX_JOBS=${JOBS}

WORKDIR /opt/megachameleon
COPY requirements.txt requirements-dev.txt requirements-gpu.txt ./
RUN pip install -r requirements.txt \
    && pip install cmake==4.4.4 ninja==1.13.2 packaging==26.3 pybind11==3.1.0 wheel==0.48.0
RUN NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE pip install --no-build-isolation -r requirements-gpu.txt
RUN git clone --filter=blob:none https://github.com/NVIDIA/apex /opt/apex \
    && git -C /opt/apex checkout --quiet ${APEX_COMMIT} \
    && NVCC_APPEND_FLAGS="--threads 4" APEX_PARALLEL_BUILD=${JOBS} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        pip install --no-build-isolation /opt/apex \
    && rm -rf /opt/apex
RUN pip install -r requirements-dev.txt

COPY . .
RUN pip install --no-deps --no-build-isolation --editable . \
    && touch /opt/venv/.megachameleon-runtime /opt/venv/.megachameleon-development
CMD ["python", "tools/train.py", "--help"]

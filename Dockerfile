# An image for GPU nodes: docker build -t calm_dist .
#
# NVIDIA's PyTorch image keeps its torch, numpy, Triton and flash-attn, which are built for each
# other; everything else has the versions of constraints.txt.
ARG IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${IMAGE}

# The image's own constraints contradict ours.
ENV PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1
# The image sets it to 1: every product of fp32 tensors would be one of TF32, wrong by 1e-3.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0

WORKDIR /opt/calm_dist
COPY . .
# Editable: tools/gpu_check.py and tools/study.py look for recipes/ and tools/ beside the package.
# Without dependencies: Streaming asks for an older numpy than the image's. docker/requirements.py
# lists what both need besides what the image has.
RUN pip install --no-deps -c constraints.txt mosaicml-streaming -e .
RUN python docker/requirements.py > /tmp/requirements.txt \
 && python docker/requirements.py --constraints > /tmp/constraints.txt \
 && pip install -c /tmp/constraints.txt -r /tmp/requirements.txt \
 && python docker/requirements.py --check /tmp/constraints.txt \
 && python tools/train.py recipes/calm_m.yaml --dry-run

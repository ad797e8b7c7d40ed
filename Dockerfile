# syntax=docker/dockerfile:1
# dpquant on a CPU. Nothing in it needs a network:
#   docker build -t dpquant .
#   docker run --rm --network none -v "$PWD/runs:/home/dpquant/runs" dpquant train

FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008 # compiler and git of whatever security update the base image has
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/dpquant \
    && /opt/dpquant/bin/pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && /opt/dpquant/bin/pip install -c constraints.txt . \
    && /opt/dpquant/bin/python -c "import dpquant.native as native; assert native.kernels, native.obstacle"

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008 # OpenMP, which torch and the kernels use; an allocator without holes (docs/performance.md)
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libjemalloc2 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dpquant
COPY --from=build /opt/dpquant /opt/dpquant
USER 1000
WORKDIR /home/dpquant
ENV PATH=/opt/dpquant/bin:$PATH LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1
ENTRYPOINT ["dpquant"]
CMD ["--help"]

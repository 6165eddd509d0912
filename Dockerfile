# docker build -t equilab . && docker run --rm -it -v "$PWD/results:/equilab/results" equilab
# With --build-arg TORCH=cpu, torch comes without CUDA's libraries; else run it with --gpus all.
FROM python:3.13-slim AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

FROM base
WORKDIR /equilab
ARG TORCH=
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY equilab equilab
RUN make .venv/installed TORCH=$TORCH
COPY . .
ENV PATH=/equilab/.venv/bin:$PATH
CMD ["make", "study"]

# docker build -t unhorse .        docker run --rm --network none -v "$PWD/models:/models:ro" unhorse inspect /models
FROM python:3.11-slim

# arguments of pip for torch: those that PyTorch's start page gives for a CPU build keep the image small
ARG TORCH_ARGUMENTS=""
ARG EXTRAS="onnx,keras,hf"

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 \
    UNHORSE_CACHE=/tmp/unhorse HOME=/tmp

WORKDIR /opt/unhorse
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_ARGUMENTS} torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[${EXTRAS}]" && rm -rf /opt/unhorse

RUN useradd --system --uid 10001 --no-create-home unhorse
USER unhorse
WORKDIR /models
ENTRYPOINT ["unhorse"]
CMD ["--help"]

# A worker or driver image: the same environment on every node. Data, weights and output are mounted or remote.
FROM python:3.11-slim
WORKDIR /opt/smsbatch
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY smsbatch smsbatch
RUN pip install --no-cache-dir --constraint constraints.txt '.[ray]'
WORKDIR /workspace
ENTRYPOINT ["smsbatch"]
CMD ["--help"]

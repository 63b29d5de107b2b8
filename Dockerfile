# The server and the model that comes along; models that are pulled, and the store, lie on the volume. docs/deployment.md
FROM python:3.11-slim

# Another index for pip to look at: with PyTorch's index of CPU builds the image needs no gigabytes of CUDA.
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=cloud,heic,parquet,postgres,redis,svg,video

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home fundament \
    && install --directory --owner fundament /data

WORKDIR /opt/fundament
COPY Makefile README.md LICENSE constraints.txt pyproject.toml ./
COPY src src
RUN make install \
    && .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[$EXTRAS]" \
    && rm -rf /root/.cache

ENV PATH=/opt/fundament/.venv/bin:$PATH FUNDAMENT_DATA_DIR=/data FUNDAMENT_HOST=0.0.0.0
USER fundament
VOLUME /data
EXPOSE 8080
ENTRYPOINT ["fundament"]
CMD ["serve", "--auth"]

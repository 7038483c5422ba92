# gpt_jax for CPU, or for NVIDIA GPUs:
#
#     docker build -t gpt_jax .
#     docker build -t gpt_jax:cuda12 --build-arg EXTRA=cuda12 .
#     docker run --rm -v "$PWD/runs:/runs" gpt_jax
#
# EXTRA is one of setup.py's: cuda12, cuda13, tpu, notebook, test.
FROM python:3.12-slim

ARG EXTRA=""

# An account without rights, whose home takes the caches (token shards, compiled programs). --user of `docker run`
# may name another: home and /runs are open to all.
RUN useradd --create-home --uid 1000 gpt \
    && mkdir /runs \
    && chmod 1777 /runs /home/gpt
ENV HOME=/home/gpt PYTHONUNBUFFERED=1

# configs/ are files, not part of the package: the working folder is the project's.
WORKDIR /app
COPY . /app
RUN pip install --no-cache-dir --editable ".${EXTRA:+[$EXTRA]}"

USER gpt
VOLUME /runs

ENTRYPOINT ["python", "-m"]
CMD ["gpt_jax.main", "--config=configs/quickstart.py", "--workdir=/runs/quickstart"]

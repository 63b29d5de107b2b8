"""Batch jobs: four endpoints over one queue.

- `batch`: `/v1/batch`, as the Search Foundation API has jobs; `batches`: `/v1/batches`, as OpenAI has them;
  `bulk`: `/v1/bulk-embeddings`, the older form; `files`: `/v1/files`, uploads and what jobs made.
- `queue`: jobs handed in, found and ended, whatever the endpoint.
- `lines`: what a worker does with a job's input.
- `multipart`: forms with a file.
"""

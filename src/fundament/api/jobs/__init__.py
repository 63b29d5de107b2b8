"""Batch jobs: four endpoints over one queue.

- `batch` is `/v1/batch`, jobs as the Search Foundation API has them; `batches` is `/v1/batches`, as OpenAI has them;
  `bulk` is `/v1/bulk-embeddings`, the older form; `files` is `/v1/files`, uploads and what jobs wrote.
- `queue` hands in, finds and ends jobs of any of these; `downloads` sends what they wrote, `signatures` makes links to
  that which need no key, and signs webhooks; `multipart` reads forms with a file.
- `chunks`, `lines` and `outcomes` are what a worker does with a job's input: divide it, read it, embed it.
"""

"""llama.cpp itself, through the server that the package xllamacpp carries: the authority on what a file means."""

import json
import math
import urllib.request
from contextlib import contextmanager

import xllamacpp


class Server:
    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 512
        params.warmup = False
        self._server = xllamacpp.Server(params)

    def _post(self, route, body):
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    def next_token_logprobs(self, ids, vocab_size):
        """Log-probabilities of the token behind `ids`, one per token of the vocabulary."""
        answer = self._post("/completion", {
            "prompt": ids, "n_predict": 1, "n_probs": vocab_size, "temperature": 0.0, "cache_prompt": False})
        found = {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}
        return [found.get(token, -math.inf) for token in range(vocab_size)]


@contextmanager
def serve(path):
    server = Server(path)
    try:
        yield server
    finally:
        del server

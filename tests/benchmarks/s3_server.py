"""A moto S3 server that puts a local folder's files under ``run/`` in a bucket; uploading 100,000 of them takes minutes."""

import logging
import sys
import threading
from pathlib import Path

from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer


def serve(folder: Path, bucket: str) -> None:
    """Fill the bucket, print the server's address, and serve until killed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket(bucket, "us-east-1")
    for file in folder.rglob("*"):
        if file.is_file():
            backend.put_object(bucket, f"run/{file.relative_to(folder)}", file.read_bytes())
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])

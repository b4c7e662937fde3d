"""Score images over HTTP: a Ray Serve application whose ingress is a FastAPI app; needs the extra `serve`."""

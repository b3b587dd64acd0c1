from bench.engines.protocol import serve

if __name__ == "__main__":
    raise SystemExit(serve())

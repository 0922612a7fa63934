"""What lies in a storage, read and altered past `Storage`."""

from pathlib import Path

import boto3


class Raw:
    """The stored bytes, without the code under test."""

    def __init__(self, uri: str):
        self.uri = uri
        if uri.startswith("s3://"):
            self.bucket, self.prefix = uri.removeprefix("s3://").split("/", 1)
            self.client = boto3.client("s3")

    def read(self, path: str) -> bytes:
        if self.uri.startswith("s3://"):
            return bytes(self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")["Body"].read())
        return Path(self.uri, path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        if self.uri.startswith("s3://"):
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)
        else:
            Path(self.uri, path).parent.mkdir(parents=True, exist_ok=True)
            Path(self.uri, path).write_bytes(data)

    def delete(self, path: str) -> None:
        if self.uri.startswith("s3://"):
            self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")
        else:
            Path(self.uri, path).unlink()

    def paths(self) -> set[str]:
        if self.uri.startswith("s3://"):
            found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + "/").get("Contents", [])
            return {entry["Key"].removeprefix(self.prefix + "/") for entry in found}
        return {path.relative_to(self.uri).as_posix() for path in Path(self.uri).rglob("*") if path.is_file()}

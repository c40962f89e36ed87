"""Certificates of any age, of a CA whose folder is at hand."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from flexlora.deployment.key_files import load_certificate, read_private_key
from flexlora.storage import write_atomically


def dated(path: Path, before: float, after: float) -> None:
    """Sign the certificate in a file anew, valid between these seconds from now."""
    old, now = load_certificate(path), datetime.now(UTC)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), x509.random_serial_number()
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.not_valid_before(now + timedelta(seconds=before))
    builder = builder.not_valid_after(now + timedelta(seconds=after))
    made = builder.sign(read_private_key(path.with_name("ca.key")), hashes.SHA256())
    write_atomically(path, made.public_bytes(serialization.Encoding.PEM), 0o644)

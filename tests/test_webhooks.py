"""How webhooks are signed, and how long they are tried."""

import base64
from datetime import timedelta

import pytest
from pydantic import ValidationError

from fundament.config import Settings
from fundament.webhooks import DELAYS, signature


def test_the_signature_is_that_of_standard_webhooks() -> None:
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    # The example of the Standard Webhooks libraries' own tests.
    assert signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


def test_tries_last_a_day() -> None:
    assert timedelta(hours=23) < sum(DELAYS, timedelta()) < timedelta(hours=25)
    assert list(DELAYS) == sorted(DELAYS)


def test_a_secret_is_base64() -> None:
    assert Settings(webhook_secret="whsec_MDEyMzQ1Njc4OWFiY2RlZg==").webhook_secret
    with pytest.raises(ValidationError, match="write whsec_ and base64"):
        Settings(webhook_secret="hunter2!")
    for short in ("whsec_", "whsec_c2hvcnQ="):
        with pytest.raises(ValidationError, match="a secret has 16 at least"):
            Settings(webhook_secret=short)

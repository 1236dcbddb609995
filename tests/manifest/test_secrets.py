"""What a manifest may not hold, in every form in which it is met; and the ordinary texts that look a little like it."""

from __future__ import annotations

import re
import time

import pytest

from smsbatch.manifest import SECRET
from smsbatch.manifest.sections import Style
from smsbatch.storage.retries import redact

X = "c0FfEe" * 8  # stands for the secret part, which may not be shown
SECRETS = [
    f"hf_{X}",
    f"api_org_{X}",
    f"https://huggingface.co/a/b.safetensors?token=hf_{X}",
    f"a prompt with hf_{X} inside",
    f"ghp_{X}",
    f"gho_{X}",
    f"ghu_{X}",
    f"ghs_{X}",
    f"ghr_{X}",
    f"github_pat_11ABC_{X}",
    f"https://{X}@github.com/a/b",
    f"https://x-access-token:ghs_{X}@github.com/a/b",
    f"glpat-{X}",
    f"gldt-{X}",
    f"xoxb-123456789012-{X}",
    f"xoxp-{X}",
    f"xapp-1-{X}",
    f"sk-{X}",
    f"sk-proj-{X}",
    f"sk-ant-api03-{X}",
    f"sk-ant-api03-{X[:20]}-_{X}_-{X}AA",
    f"sk-proj-{X[:8]}_{X}-{X}",
    f"gsk_{X}",
    f"hvs.{X}",
    f"whsec_{X}",
    f"https://h/a.tar?x-functions-key={X}",
    f"https://h/a.tar?subscription-key={X}",
    f"https://h/a.tar?authkey={X}",
    f"https://h/a.tar?session={X}",
    f"sk_live_{X}",
    f"r8_{X}",
    f"npm_{X}",
    f"nvapi-{X}",
    f"pypi-AgEI{X}",
    f"dckr_pat_{X}",
    f"SG.{X}.{X}",
    f"AIzaSy{X}",
    f"ya29.{X}",
    f"GOCSPX-{X}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIi{X}.{X}",
    f"AWS_SECRET_ACCESS_KEY={X}",
    f"aws_secret_access_key: {X}",
    f"aws_secret_access_key = {X}",
    f"secretAccessKey={X}",
    f'"SecretAccessKey": "{X}"',
    f"AWS_SESSION_TOKEN={X}",
    f"HF_TOKEN={X}",
    f"api_key={X}",
    f"api-key: {X}",
    f"x-api-key: {X}",
    f"client_secret={X}",
    f"password={X}",
    f"password: {X}",
    "password: hunter2-c0FfEe",
    f"token={X}",
    f"secret: {X}",
    f"Authorization: Bearer {X}",
    f"authorization: token {X}",
    f"Authorization: Basic {X}",
    f"Bearer {X}",
    f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={X}==;EndpointSuffix=core.windows.net",
    f"Endpoint=sb://me;SharedAccessKeyName=root;SharedAccessKey={X}=",
    f"SharedKey me:{X}=",
    *[
        f"https://example.org/a.tar?v=1&{name}={X}"
        for name in (
            *("sig", "sign", "code", "tkn", "tok", "token", "Token", "key", "pw", "pwd", "pass", "password", "passwd"),
            *("auth", "authorization", "auth_token", "access_token", "oauth_token", "bearer", "jwt", "sas", "hmac"),
            *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "X-Goog-Credential"),
            *("Signature", "q-signature", "apiKey", "api_key", "api-key", "AWSAccessKeyId", "client_secret", "x-sig"),
            *("sessionid", "session_id", "passphrase", "private_key"),
        )
    ],
    f"https://example.org/a.tar?code={X}",
    f"https://example.org/a.tar;token={X}",
    f"https://example.org/a.tar?a=1&amp;sig={X}",
    f"https://example.org/a.tar#access_token={X}",
    f"https://me:{X}@example.org/a.tar",
    f"https://me:{X}/{X}@example.org/a.tar",
    f"https://me:{X} {X}@example.org/a.tar",
    f"https://me:{X}%2F%40@example.org/a.tar",
    f"https://me:{X}@{X}@example.org/a.tar",
    f"https://me:{X}?{X}#@example.org/a.tar",
    f"//me:{X}@example.org/a.tar",
    f"s3://AKIA0123456789ABCDEF:{X}/+{X}@bucket/a.tar",
    f"s3://key:{X}@bucket/a.tar",
    f"ftp://me:{X}@host/a",
    f"postgresql://me:{X}@localhost:5432/db",
    f"redis://:{X}@localhost:6379",
    f"-----BEGIN RSA PRIVATE KEY-----\n{X}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY----- {X}",
    f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{X}",
]
HARMLESS = [
    "data/photos",
    "/mnt/tokens/secret/keys/a.tar",
    "C:/pictures/a@b",
    "s3://bucket/sig=1/{0..3}.tar",
    "s3://bucket/token=1/me@x/a?key.tar",
    "s3://bucket/token=20240101/part-0.tar",
    "s3://bucket/secret=public/a.tar",
    "https://example.org:8080/a.tar?version=3&page=a@b",
    "https://example.org:8080/a/me@home.tar",
    "https://example.org/@me/a.tar?author=me&design=1&monkey=2&sort_key=date&keyword=x&expires=1",
    "https://example.org/a.jpg?width=200&height=100&fit=crop&quality=80&format=webp",
    "https://example.org/a.jpg?barcode=4006381333931&zipcode=10115&country_code=de&encode=1",
    "https://example.org/a.jpg?assign=1&signal=2&author=x&compass=north&bypass=1",
    "https://example.org/a.jpg?v=3f2504e0-4f89-11d3-9a0c-0305e82c3301&hash=9e107d9d372bb6826bd81d3542a419d6",
    "https://example.org/?token=&sig=",
    "abfs://container@account.dfs.core.windows.net/a.tar",
    "sftp://me@host/a.tar",
    "git@github.com:a/b",
    "me@example.org",
    "a poster that says write to me@example.org: now",
    "data/me@home:1/a.tar",
    "token",
    "a secretary at her desk, a token of love, the key to the city, passwords",
    "a code = art",
    "what? code=art & sign=language",
    "secret: a garden behind the wall",
    "the password: friend",
    "a token: 3 coins",
    "bearer of the ring, standard bearer in armour",
    "authorization: no",
    "basic shapes, basic colours",
    "tokenizer: openai/clip-vit-large-patch14",
    "keys: red, green; sign: left",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    '"d41d8cd98f00b204e9800998ecf8427e-12"',
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
    "stabilityai/stable-diffusion-2-1-base",
    "hf-internal-testing/tiny-stable-diffusion-torch",
    "hf_hub_download and hf_transfer",
    "sk-learn-based-features-of-pictures-version-2",
    "ghp_short",
    "eyJ of a storm",
    "{style}, {caption}",
    "-----BEGIN CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "tiny:styles/oil.safetensors",
    "https://${TOKEN}@example.org/a.tar",
    "https://me:${TOKEN}@example.org/a.tar",
    "https://example.org/a.tar?token=${TOKEN}&v=1",
    "HF_TOKEN=${HF_TOKEN}",
]


@pytest.mark.parametrize("text", SECRETS)
def test_refused_and_shown_nowhere(text: str) -> None:
    with pytest.raises(ValueError, match="holds a secret"):
        Style(prompt=text)
    shown = redact(f"cannot read {text}, and so on")
    assert not re.search("c0FfEe", shown)
    assert "***" in shown
    assert shown.startswith("cannot read ")


@pytest.mark.parametrize("text", HARMLESS)
def test_taken_and_shown(text: str) -> None:
    assert Style(prompt=text).prompt == text
    assert redact(text) == text


PIECES = ["?", "?token", "token", "token=", "?a-", ":", "://", "://a:", "@", "://@:", "https://", "//a:b", "a@", ";"]
PIECES += ["a;", "&;=", "password:", "password: a", "eyJ", "eyJa.", "sk-a-", "SG.", "hf_", "a_", " ", "-----BEGIN "]
PIECES += ["authorization: a ", "bearer ", "secret key ", "api", "\n", "1", "A", "${", "AKIA", "-"]


@pytest.mark.parametrize("piece", PIECES)
def test_the_time_is_linear(piece: str) -> None:
    """A table may hold any text as an address, and each is searched. Quadratic time would be many seconds."""
    for start in ("", "https://", "s3://a:", "?", "eyJ", "password: ", "-----BEGIN PRIVATE KEY-----"):
        started = time.process_time()
        SECRET.sub("***", start + piece * (20_000 // len(piece)))
        assert time.process_time() - started < 0.5


def test_binary_of_yaml_is_no_way_around() -> None:
    with pytest.raises(ValueError, match="holds a secret"):
        Style.model_validate({"prompt": f"hf_{X}".encode(), "lora": "x.safetensors"})

"""What the tests of training share with those of composition: tiny models, a tokenizer, adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in ("composition", "routing"):
    sys.path.append(str(Path(__file__).parents[1] / folder))

from compose_models import make_tokenizer  # noqa: E402
from training_models import make_examples, save_pool  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from hub_router.training import Example  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four adapters of one tiny Llama, of different ranks and modules."""
    return save_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="session")
def examples(pool: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Twelve of each adapter's task, answered by the base model with that adapter."""
    return make_examples(pool, tokenizer)

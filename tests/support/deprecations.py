"""What libraries of Hugging Face deprecate by their log is an error, as what they warn of is by setup.cfg."""

import logging
import re

LIBRARIES = ("transformers", "huggingface_hub", "peft", "accelerate", "datasets", "sentence_transformers")
REFUSED = "`BlipModel`"  # a backbone that GCL refuses too; a test loads it to see that


class RaiseDeprecations(logging.Handler):
    """transformers deprecates by `logger.warning_once` as often as by `warnings.warn`."""

    def emit(self, record):
        message = record.getMessage()
        if re.search("depre[a-z]*ted|will be removed", message, re.IGNORECASE) and not message.startswith(REFUSED):
            raise FutureWarning(message)


for name in LIBRARIES:
    logging.getLogger(name).addHandler(RaiseDeprecations(logging.WARNING))

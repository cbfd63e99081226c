"""Stand-in: for each task, a pipeline with the given model, examples for it, and what must hold of its answers."""

from typing import Any
from unittest import TestCase

from transformers import (
    FeatureExtractionPipeline,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
    TextGenerationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
)


class PipelineTests(TestCase):
    pipeline_class: type[Pipeline]
    options: dict[str, Any] = {}
    examples = ["The capital of France is", "Name a river in Egypt."]

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str
    ) -> tuple[Pipeline, list[str]]:
        pipeline = self.pipeline_class(model=model, tokenizer=tokenizer, dtype=dtype, **self.options)
        return pipeline, self.examples

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        answers = pipeline(examples)
        self.assertEqual(len(answers), len(examples))
        for example, answer in zip(examples, answers, strict=True):
            self.check(pipeline, example, answer)

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        raise NotImplementedError


class FeatureExtractionPipelineTests(PipelineTests):
    pipeline_class = FeatureExtractionPipeline

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        self.assertEqual(len(answer[0]), len(pipeline.tokenizer(example).input_ids))
        self.assertEqual(len(answer[0][0]), pipeline.model.config.hidden_size)


class TextClassificationPipelineTests(PipelineTests):
    pipeline_class = TextClassificationPipeline

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        self.assertIn(answer["label"], pipeline.model.config.id2label.values())
        self.assertAlmostEqual(sum(label["score"] for label in pipeline(example, top_k=None)), 1, places=3)


class TextGenerationPipelineTests(PipelineTests):
    pipeline_class = TextGenerationPipeline
    options = {"max_new_tokens": 5}

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        self.assertTrue(answer[0]["generated_text"].startswith(example))
        samples = pipeline(example, do_sample=True, num_return_sequences=3, return_full_text=False)
        self.assertEqual(len(samples), 3)
        chat = pipeline([{"role": "user", "content": example}])
        self.assertEqual(chat[0]["generated_text"][-1]["role"], "assistant")


class TokenClassificationPipelineTests(PipelineTests):
    pipeline_class = TokenClassificationPipeline

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        self.assertEqual(len(answer), len(pipeline.tokenizer(example, add_special_tokens=False).input_ids))
        for token in answer:
            self.assertIn(token["entity"], pipeline.model.config.id2label.values())


class ZeroShotClassificationPipelineTests(PipelineTests):
    pipeline_class = ZeroShotClassificationPipeline
    options = {"candidate_labels": ["geography", "music"]}

    def check(self, pipeline: Pipeline, example: str, answer: Any) -> None:
        self.assertEqual(answer["sequence"], example)
        self.assertEqual(set(answer["labels"]), {"geography", "music"})
        self.assertAlmostEqual(sum(answer["scores"]), 1, places=3)

"""The paper's recipe for a data set of hard edits: write → generate → harmonize → reverse → caption → box → verify.

``stages``       what a stage is given and makes, and the shelf where every result lies whole
``checkpoints``  models found, and named by what their files hold
``scenes``       the procedural model of every stage, which knows the truth
``words``        a language model that writes, a vision-language model that captions
``pictures``     a pipeline that draws, an editor that harmonizes
``reversal``     the pair the other way round
``boxes``        a vision-language model that boxes; its boxes against the true ones
``dataset``      shards in OmniEdit's columns, the store to review, verdicts
``run``          ``recipe``: all stages in order, resumed, one run at a time, and the summary
"""

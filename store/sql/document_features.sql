-- Features that fire in some places of the text; windows first, as constants, so that all other rows are skipped.
SELECT feature, count(*) AS count, max(activation) AS max_activation
FROM evidence.activations_by_document
WHERE segment_id = {segment_id} AND window_id IN ({windows}) AND ({places})
GROUP BY feature

// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The target of a token from the summary of its logits, in float64: the conventions of loss/target.py and loss/status.py.
"use strict";

const MIN_ENTROPY = 1e-6;
const MATCH_TOLERANCE = 1e-5;
const BETA_RANGE = 16;
const RARE = 1e-3;
const FAR_SHARE = 1e-4; // the largest share of the bin of far columns in a sum that counts as known

/**
 * The summary of a token's logits (instruments/explorer/logit_summary.py), the models in the order student, teacher,
 * reference and c, the mean of the controls.
 * @typedef {object} Summary
 * @property {ArrayLike<number>} ids ids of the candidates; -1 marks a slot without a candidate
 * @property {ArrayLike<number>[]} logits of each model, the logits of the candidates
 * @property {ArrayLike<number>} counts the number of columns of each bin
 * @property {ArrayLike<number>[]} means of each model, the mean logit of each bin
 * @property {ArrayLike<number>[]} covariances of the pairs (0, 0), (0, 1) .. of models, the covariance in each bin
 * @property {ArrayLike<number>} logNormalisers of each model
 * @property {ArrayLike<number>} studentMeans the mean logit of each model under the student
 */

/**
 * The choice of a target and of a divergence.
 * @typedef {object} Settings
 * @property {string} rule entropy_matched, fixed, batch or teacher_alone
 * @property {number} teacher_weight
 * @property {number | "1 + w" | null} k_max
 * @property {number | null} k the k of fixed and batch; null is 1 + w
 * @property {string} anchor student or reference
 * @property {string} match the model whose entropy the target has: student or reference
 * @property {number} [num_controls] the number of controls, whose c is subtracted from the teacher; 0 is none
 * @property {string} divergence reverse_kl, forward_kl or jsd
 * @property {number} jsd_lambda
 * @property {number} order the order of the Renyi divergence in the place of KL; 1 is KL
 * @property {number | null} forward_above with reverse_kl: H(q) in nats above which KL(q || p) is added
 */

/**
 * The mix m of the logits of one token: its value at the candidates that exist, and its moments in the bins.
 * @typedef {{slots: number[], values: Float64Array, bins: number[], logCounts: Float64Array, means: Float64Array,
 *   variances: Float64Array, top: number}} Mix
 */

/**
 * The target of one token.
 * @typedef {object} TokenTarget
 * @property {number} k
 * @property {string} status a name of loss.status.Status in lower case
 * @property {number} entropy H(q) in nats
 * @property {number} reverseKl KL(p || q)
 * @property {number} loss the chosen divergence; NaN if the summary does not determine it
 * @property {number} rareMass the mass of q on tokens to which the student gives less than 1e-3
 * @property {Float64Array} q of each candidate
 * @property {number} best the slot of the candidate with the largest q
 * @property {number} studentBest the slot of the candidate with the largest p
 */

/**
 * Return the weight of each model in the mix m.
 * @param {Settings} settings
 * @param {number} numModels
 * @returns {number[]}
 */
function mixWeights(settings, numModels) {
  const weights = new Array(numModels).fill(0);
  if (settings.rule === "teacher_alone") {
    weights[1] = 1;
    return weights;
  }
  weights[1] = settings.teacher_weight;
  if (settings.num_controls) weights[numModels - 1] = -settings.teacher_weight;
  weights[settings.anchor === "reference" ? 2 : 0] += 1;
  return weights;
}

/**
 * Return the sum of the weights of the mix: 1 + w, and 1 with controls, since w t and -w c cancel.
 * @param {Settings} settings
 */
function geometricK(settings) {
  return settings.num_controls ? 1 : 1 + settings.teacher_weight;
}

/**
 * Return the bound of k as a number, or null.
 * @param {Settings} settings
 */
function kBound(settings) {
  return settings.k_max === "1 + w" ? geometricK(settings) : settings.k_max;
}

/**
 * Return the lowest and the highest beta that may be solved for, and whether the lowest one is 1 / k_max.
 * @param {Settings} settings
 */
function betaRange(settings) {
  const unit = geometricK(settings);
  const bound = kBound(settings);
  const isBound = bound !== null && bound <= BETA_RANGE * unit;
  return { low: isBound ? 1 / /** @type {number} */ (bound) : 1 / unit / BETA_RANGE, high: BETA_RANGE / unit, isBound };
}

/**
 * Return the mix of a token's logits.
 * @param {Summary} summary
 * @param {number[]} weights
 * @returns {Mix}
 */
function mixOf(summary, weights) {
  const used = weights.map((weight, model) => ({ weight, model })).filter(({ weight }) => weight !== 0);
  const slots = [];
  const values = [];
  for (let slot = 0; slot < summary.ids.length; slot++) {
    if (summary.ids[slot] < 0) continue;
    let value = 0;
    for (const { weight, model } of used) value += weight * summary.logits[model][slot];
    if (!Number.isFinite(value)) continue;
    slots.push(slot);
    values.push(value);
  }
  const bins = [];
  for (let bin = 0; bin < summary.counts.length; bin++) if (summary.counts[bin] > 0) bins.push(bin);
  const means = Float64Array.from(bins, (bin) =>
    used.reduce((sum, { weight, model }) => sum + weight * summary.means[model][bin], 0),
  );
  const variances = Float64Array.from(bins, (bin) => Math.max(0, quadratic(summary, bin, weights, weights)));
  const logCounts = Float64Array.from(bins, (bin) => Math.log(summary.counts[bin]));
  return { slots, values: Float64Array.from(values), bins, logCounts, means, variances, top: Math.max(...values) };
}

/**
 * Return the covariance of two weighted sums of the models' logits within a bin.
 * @param {Summary} summary
 * @param {number} bin
 * @param {number[]} left
 * @param {number[]} right
 */
function quadratic(summary, bin, left, right) {
  let total = 0;
  let pair = 0;
  for (let i = 0; i < left.length; i++) {
    for (let j = i; j < left.length; j++, pair++) {
      const factor = i === j ? left[i] * right[i] : left[i] * right[j] + left[j] * right[i];
      if (factor !== 0) total += factor * summary.covariances[pair][bin];
    }
  }
  return total;
}

/**
 * Return log Z, the entropy of softmax(beta m) and the variance of m under it.
 * @param {Mix} mix
 * @param {number} beta
 */
function sumsAt(mix, beta) {
  const { values, logCounts, means, variances } = mix;
  let top = beta * mix.top;
  for (let b = 0; b < means.length; b++) {
    top = Math.max(top, logCounts[b] + beta * means[b] + (beta * beta * variances[b]) / 2);
  }
  let total = 0;
  let first = 0;
  let second = 0;
  for (let i = 0; i < values.length; i++) {
    const weight = Math.exp(beta * values[i] - top);
    const value = values[i] - mix.top;
    total += weight;
    first += weight * value;
    second += weight * value * value;
  }
  for (let b = 0; b < means.length; b++) {
    const weight = Math.exp(logCounts[b] + beta * means[b] + (beta * beta * variances[b]) / 2 - top);
    const value = means[b] + beta * variances[b] - mix.top; // the mean of the bin under q
    total += weight;
    first += weight * value;
    second += weight * (value * value + variances[b]);
  }
  const mean = first / total;
  const logZ = top + Math.log(total);
  return { logZ, entropy: logZ - beta * (mean + mix.top), variance: Math.max(0, second / total - mean * mean) };
}

/**
 * Return the beta in the range of the settings at which softmax(beta m) has the wanted entropy, or the nearer end.
 * @param {Mix} mix
 * @param {number} wanted in nats
 * @param {Settings} settings
 */
function matchingBeta(mix, wanted, settings) {
  const range = betaRange(settings);
  const goal = Math.max(wanted, MIN_ENTROPY);
  if (!(sumsAt(mix, range.low).entropy > goal)) return range.low;
  if (sumsAt(mix, range.high).entropy > goal) return range.high;
  let left = Math.log(range.low);
  let right = Math.log(range.high);
  let at = Math.min(right, Math.max(left, 0));
  for (let step = 0; step < 100 && right - left > 1e-13; step++) {
    const beta = Math.exp(at);
    const { entropy, variance } = sumsAt(mix, beta);
    if (entropy > goal) left = at;
    else right = at;
    // Newton in log beta: dH / d log beta = -beta^2 Var(m); bisection where it leaves the interval.
    const next = at + (entropy - goal) / (beta * beta * variance);
    if (Math.abs(next - at) < 1e-13) return Math.exp(at);
    at = next > left && next < right ? next : (left + right) / 2;
  }
  return Math.exp(at);
}

/**
 * Return the status of a beta that was solved for.
 * @param {number} wanted
 * @param {number} found the entropy of the target
 * @param {number} beta
 * @param {Settings} settings
 */
function statusOf(wanted, found, beta, settings) {
  if (!(wanted >= MIN_ENTROPY) || !Number.isFinite(beta)) return "undetermined";
  if (!(Math.abs(found - wanted) > MATCH_TOLERANCE)) return "matched";
  const range = betaRange(settings);
  if (beta <= range.low) return range.isBound ? "capped" : "out_of_range";
  return beta >= range.high ? "out_of_range" : "unconverged";
}

/**
 * Return the target of a token and its divergence from the student.
 * @param {Summary} summary
 * @param {Settings} settings
 * @param {{student: number | null, reference: number | null}} entropies stored entropies, in nats
 * @returns {TokenTarget}
 */
function targetOf(summary, settings, entropies) {
  const weights = mixWeights(settings, summary.logits.length);
  const mix = mixOf(summary, weights);
  const wanted = (settings.match === "reference" ? entropies.reference : entropies.student) ?? NaN;
  const given = givenBeta(settings);
  const beta = given ?? matchingBeta(mix, wanted, settings);
  const { logZ, entropy } = sumsAt(mix, beta);
  const status = given === null ? statusOf(wanted, entropy, beta, settings) : "given";
  const q = new Float64Array(summary.ids.length);
  mix.slots.forEach((slot, i) => (q[slot] = Math.exp(beta * mix.values[i] - logZ)));
  let expected = 0;
  weights.forEach((weight, model) => {
    if (weight !== 0) expected += weight * summary.studentMeans[model];
  });
  const reverseKl = Math.max(0, -(entropies.student ?? NaN) - beta * expected + logZ);
  const rest = binsUnder(summary, mix, weights, beta, logZ);
  return {
    k: 1 / beta,
    status,
    entropy,
    reverseKl,
    loss: divergenceOf(summary, settings, { weights, beta, logZ, q, rest, entropy, reverseKl }),
    rareMass: rareMass(summary, q, rest),
    q,
    best: largest(q),
    studentBest: largest(summary.logits[0], summary.ids),
  };
}

/**
 * Return the beta that the rule gives, or null where beta is solved for.
 * @param {Settings} settings
 */
function givenBeta(settings) {
  if (settings.rule === "entropy_matched") return null;
  return settings.rule === "teacher_alone" ? 1 : 1 / (settings.k ?? geometricK(settings));
}

/**
 * Return of each bin that has columns: its mass under q and under p, mean and deviation of the student's logit under q,
 * and of log q - log p its mean under p and under q and its deviation.
 * @param {Summary} summary
 * @param {Mix} mix
 * @param {number[]} weights
 * @param {number} beta
 * @param {number} logZ
 */
function binsUnder(summary, mix, weights, beta, logZ) {
  const ofStudent = weights.map((_, model) => (model === 0 ? 1 : 0));
  const normaliser = summary.logNormalisers[0];
  return mix.bins.map((bin, b) => {
    const student = summary.means[0][bin];
    const variance = Math.max(0, summary.covariances[0][bin]);
    const together = beta * quadratic(summary, bin, weights, ofStudent); // the covariance of beta m and s
    const mixVariance = beta * beta * mix.variances[b];
    const ratio = beta * mix.means[b] - logZ - student + normaliser;
    return {
      mass: Math.exp(mix.logCounts[b] + beta * mix.means[b] + mixVariance / 2 - logZ),
      studentMass: Math.exp(mix.logCounts[b] + student + variance / 2 - normaliser),
      student: student + together,
      deviation: Math.sqrt(variance),
      ratioUnderStudent: ratio + together - variance,
      ratioUnderTarget: ratio + mixVariance - together,
      ratioDeviation: Math.sqrt(Math.max(0, mixVariance - 2 * together + variance)),
    };
  });
}

/**
 * The target of one token as its divergence needs it: q = softmax(beta m) with m = weights * logits, and log Z.
 * @typedef {{weights: number[], beta: number, logZ: number, q: Float64Array, rest: ReturnType<typeof binsUnder>,
 *   entropy: number, reverseKl: number}} FoundTarget
 */

/**
 * Return the divergence of the settings between student and target; NaN if the summary does not determine it.
 * @param {Summary} summary
 * @param {Settings} settings
 * @param {FoundTarget} target
 */
function divergenceOf(summary, settings, target) {
  if (settings.order !== 1) return renyi(summary, settings, target);
  if (settings.divergence === "jsd") return jsd(summary, settings.jsd_lambda, target);
  if (settings.divergence === "forward_kl") return forwardKl(summary, target);
  const isUncertain = settings.forward_above !== null && target.entropy > settings.forward_above;
  return target.reverseKl + (isUncertain ? forwardKl(summary, target) : 0);
}

/**
 * Return KL(q || p).
 * @param {Summary} summary
 * @param {FoundTarget} target
 */
function forwardKl(summary, { q, rest, entropy }) {
  let student = 0;
  for (let slot = 0; slot < q.length; slot++) if (q[slot] > 0) student += q[slot] * summary.logits[0][slot];
  for (const bin of rest) student += bin.mass * bin.student;
  return Math.max(0, -entropy - student + summary.logNormalisers[0]);
}

/**
 * Return the Renyi divergence log(sum p^b q^(1 - b)) / (order - 1), with b = order, or 1 - order for forward_kl.
 *
 * p^b q^(1 - b) is e to a mix of the models' logits, so that its sum is a normaliser, as those of p and q are.  All three
 * come from the same candidates and bins, so that p = q gives 0 and an order near 1 gives KL.
 * @param {Summary} summary
 * @param {Settings} settings
 * @param {FoundTarget} target
 */
function renyi(summary, settings, target) {
  const { weights, beta, logZ } = target;
  const isReverse = settings.divergence === "reverse_kl";
  const kl = isReverse ? target.reverseKl : forwardKl(summary, target);
  if (settings.order > 1 && kl === Infinity) return Infinity;
  const power = isReverse ? settings.order : 1 - settings.order;
  const student = weights.map((_, model) => (model === 0 ? 1 : 0));
  const both = weights.map((weight, model) => power * student[model] + (1 - power) * beta * weight);
  const sum = mixOf(summary, both);
  const { logZ: logSum } = sumsAt(sum, 1);
  const far = sum.bins.indexOf(summary.counts.length - 1); // the bin of the columns far below a maximum: a mean alone
  if (far >= 0 && sum.logCounts[far] + sum.means[far] - logSum > Math.log(FAR_SHARE)) return NaN;
  const expected = power * sumsAt(mixOf(summary, student), 1).logZ + (1 - power) * logZ;
  return Math.max(0, (logSum - expected) / (settings.order - 1));
}

/**
 * Return the Jensen-Shannon divergence.
 * @param {Summary} summary
 * @param {number} lambda
 * @param {FoundTarget} target
 */
function jsd(summary, lambda, { q, rest }) {
  const normaliser = summary.logNormalisers[0];
  let total = 0;
  for (let slot = 0; slot < q.length; slot++) {
    if (summary.ids[slot] < 0) continue;
    const p = Math.exp(summary.logits[0][slot] - normaliser);
    const middle = lambda * q[slot] + (1 - lambda) * p;
    if (q[slot] > 0) total += lambda * q[slot] * Math.log(q[slot] / middle);
    if (p > 0) total += (1 - lambda) * p * Math.log(p / middle);
  }
  // In a bin d = log q - log p counts as normally distributed, under p and under q with means of their own.
  /** @type {(d: number) => number} */
  const logMiddle = (d) => Math.log(lambda * Math.exp(d) + 1 - lambda); // log of M / p
  for (const bin of rest) {
    const ofStudent = normalMean((d) => -logMiddle(d), bin.ratioUnderStudent, bin.ratioDeviation);
    const ofTarget = normalMean((d) => d - logMiddle(d), bin.ratioUnderTarget, bin.ratioDeviation);
    total += (1 - lambda) * bin.studentMass * ofStudent + lambda * bin.mass * ofTarget;
  }
  return Math.max(0, total);
}

/**
 * Return the mean of a smooth function of a normal number (Gauss-Hermite quadrature with 5 nodes).
 * @param {(x: number) => number} of
 * @param {number} mean
 * @param {number} deviation
 */
function normalMean(of, mean, deviation) {
  const [near, far] = [1.3556261799742659 * deviation, 2.8569700138728056 * deviation];
  return (
    (8 / 15) * of(mean) +
    0.2220759220056126 * (of(mean - near) + of(mean + near)) +
    0.01125741132772069 * (of(mean - far) + of(mean + far))
  );
}

/**
 * Return the mass of q on the columns to which the student gives less than RARE.  In a bin the student's logits count as
 * normally distributed.
 * @param {Summary} summary
 * @param {Float64Array} q
 * @param {ReturnType<typeof binsUnder>} rest
 */
function rareMass(summary, q, rest) {
  let mass = 0;
  for (let slot = 0; slot < q.length; slot++) {
    if (q[slot] > 0 && Math.exp(summary.logits[0][slot] - summary.logNormalisers[0]) < RARE) mass += q[slot];
  }
  const limit = Math.log(RARE) + summary.logNormalisers[0];
  for (const bin of rest) mass += bin.mass * normalBelow((limit - bin.student) / Math.max(bin.deviation, 1e-9));
  return mass;
}

/**
 * Return the probability that a standard normal number is below x, to 1e-7 (Abramowitz and Stegun, 26.2.17).
 * @param {number} x
 */
function normalBelow(x) {
  if (Math.abs(x) > 8) return x > 0 ? 1 : 0;
  const t = 1 / (1 + 0.2316419 * Math.abs(x));
  const series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  const above = (Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI)) * series;
  return x > 0 ? 1 - above : above;
}

/**
 * Return the place of the largest value; of equal values the first.
 * @param {ArrayLike<number>} values
 * @param {ArrayLike<number>} [ids] places with a negative id do not count
 */
function largest(values, ids) {
  let best = 0;
  for (let i = 1; i < values.length; i++) {
    if ((ids === undefined || ids[i] >= 0) && values[i] > values[best]) best = i;
  }
  return best;
}

/**
 * Return the summaries of the tokens of a block as the page has them.
 * @param {Record<string, string>} block base64 of little-endian numbers, by the names of LogitSummary
 * @param {number} numModels
 * @returns {Summary[]}
 */
function decodeBlock(block, numModels) {
  const ids = new Int32Array(bytesOf(block.ids));
  const numbers = (/** @type {string} */ name) => new Float32Array(bytesOf(block[name]));
  const normalisers = numbers("log_normalisers");
  const numTokens = normalisers.length / numModels;
  /** @type {(values: Float32Array, token: number, parts: number) => Float32Array[]} */
  const split = (values, token, parts) => {
    const size = values.length / numTokens / parts;
    return Array.from({ length: parts }, (_, part) => {
      const start = (token * parts + part) * size;
      return values.subarray(start, start + size);
    });
  };
  const [logits, counts, means] = ["logits", "counts", "means"].map(numbers);
  const [covariances, studentMeans] = ["covariances", "student_means"].map(numbers);
  const width = ids.length / numTokens;
  return Array.from({ length: numTokens }, (_, token) => ({
    ids: ids.subarray(token * width, (token + 1) * width),
    logits: split(logits, token, numModels),
    counts: split(counts, token, 1)[0],
    means: split(means, token, numModels),
    covariances: split(covariances, token, (numModels * (numModels + 1)) / 2),
    logNormalisers: split(normalisers, token, 1)[0],
    studentMeans: split(studentMeans, token, 1)[0],
  }));
}

/**
 * Return the bytes of a text in base64.
 * @param {string} text
 * @returns {ArrayBuffer}
 */
function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

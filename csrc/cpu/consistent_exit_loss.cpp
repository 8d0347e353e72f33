// The loss of every exit and its gradient, row by row: both softmaxes of a row are in cache when its gradients are written.
#include <cmath>
#include <type_traits>

#include "kernels_of_capability.h"
#include "parallel.h"
#include "vec.h"

namespace cet::CET_CAPABILITY {

namespace {

constexpr int64_t kRowsPerTask = 16;  // fixed, so that the order of the sums does not depend on the threads
constexpr int64_t kBytesPerLogit = 16;  // an exponential and a logarithm cost more than the bytes read

struct Softmax {
  float* exps;  // exp(x - max), zeros behind them up to a whole register
  float max;             // logit
  float share;           // what an exponential is multiplied by for a probability
  float largest;         // probability
  float log_normalizer;  // what is subtracted from a logit for the logarithm of a probability
};

template <class T>
Vec load_upto(const T* from, int64_t n, float fill) {
  return n >= kLanes ? load(from) : load_partial(from, n, fill);
}

template <class T>
void store_upto(T* to, Vec v, int64_t n) {
  n >= kLanes ? store(to, v) : store_partial(to, v, n);
}

template <class T>
Softmax softmax(const T* logits, int64_t classes, float* exps) {
  Vec largest = splat(-INFINITY);
  for (int64_t k = 0; k < classes; k += kLanes) largest = max(load_upto(logits + k, classes - k, -INFINITY), largest);
  const float top = max(largest);
  Vec total = {};
  for (int64_t k = 0; k < classes; k += kLanes) {
    const Vec e = exp(load_upto(logits + k, classes - k, -INFINITY) - top);
    store(exps + k, e);
    total += e;
  }
  const float normalizer = sum(total), share = 1.0f / normalizer;
  return {exps, top, share, share, top + logf(normalizer)};
}

// The first of the largest, as torch.max gives it; the last class where none is, in a row with NaN.
template <class T>
int64_t argmax(const T* logits, int64_t classes, float largest) {
  int64_t k = 0;
  while (k < classes - 1 && to_float(logits[k]) != largest) ++k;
  return k;
}

template <class T>
void cross_entropy_gradient(const Softmax& p, int64_t label, int64_t classes, float scale, T* grad) {
  for (int64_t k = 0; k < classes; k += kLanes) {
    store_upto(grad + k, load(p.exps + k) * (scale * p.share), classes - k);
  }
  store(grad + label, (p.exps[label] * p.share - 1.0f) * scale);
}

// The mean of the exits' softmaxes: probabilities for exponentials, and their logarithms for logits unless these are null.
Softmax mean_softmax(const Softmax* exits, int64_t num_exits, int64_t classes, float* exps, float* logits) {
  const float share = 1.0f / static_cast<float>(num_exits);
  Vec largest = {};
  for (int64_t k = 0; k < classes; k += kLanes) {
    Vec total = {};
    for (int64_t e = 0; e < num_exits; ++e) total += load(exits[e].exps + k) * exits[e].share;
    const Vec p = total * share;
    store(exps + k, p);
    if (logits != nullptr) store(logits + k, log(p));
    largest = max(p, largest);
  }
  return {exps, 0.0f, 1.0f, max(largest), 0.0f};
}

// KL(teacher || student); the logits of both are read again, from the first-level cache. A class that the teacher rules
// out adds nothing, whatever the student's logit.
template <class TeacherT, class T>
float soft_divergence(const TeacherT* teacher_logits, const Softmax& teacher, const T* student_logits,
                      const Softmax& student, int64_t classes) {
  Vec total = {};
  for (int64_t k = 0; k < classes; k += kLanes) {
    const Vec log_p = load_upto(teacher_logits + k, classes - k, 0.0f) - teacher.log_normalizer;
    const Vec log_q = load_upto(student_logits + k, classes - k, 0.0f) - student.log_normalizer;
    const Vec p = load(teacher.exps + k);
    total += p == 0.0f ? Vec{} : p * (log_p - log_q);
  }
  return sum(total) * teacher.share;
}

// The gradient of the student's logits: its probabilities less those of the teacher, and less those of the label, by their
// shares, of which one is 0 where its term is not.
struct Shares {
  float consistency, supervised;
};

template <class T>
void soft_gradient(const Softmax& teacher, const Softmax& student, Shares shares, int64_t label, int64_t classes,
                   float scale, T* grad) {
  const float of_student = (shares.consistency + shares.supervised) * scale * student.share;
  const float of_teacher = shares.consistency * scale * teacher.share;
  for (int64_t k = 0; k < classes; k += kLanes) {
    store_upto(grad + k, load(student.exps + k) * of_student - load(teacher.exps + k) * of_teacher, classes - k);
  }
  if (shares.supervised == 0.0f) return;
  const float p = teacher.exps[label] * teacher.share, q = student.exps[label] * student.share;
  store(grad + label, (shares.consistency * (q - p) + shares.supervised * (q - 1.0f)) * scale);
}

template <class T>
void hard_gradient(int64_t target, const Softmax& student, Shares shares, int64_t label, int64_t classes, float scale,
                   T* grad) {
  cross_entropy_gradient(student, target, classes, (shares.consistency + shares.supervised) * scale, grad);
  if (shares.supervised == 0.0f || label == target) return;
  const float q = student.exps[target] * student.share, r = student.exps[label] * student.share;
  store(grad + target, (shares.consistency * (q - 1.0f) + shares.supervised * q) * scale);
  store(grad + label, (shares.consistency * r + shares.supervised * (r - 1.0f)) * scale);
}

// Of a term that is not there it is zero, even if the logits are not finite.
template <class T>
void supervised_gradient(const Softmax& p, int64_t label, int64_t classes, float scale, T* grad) {
  if (label != kUnlabelled) return cross_entropy_gradient(p, label, classes, scale, grad);
  for (int64_t k = 0; k < classes; ++k) store(grad + k, 0.0f);
}

// What differences of probabilities are multiplied by to be gradients of the loss; in float16, where small ones would be
// lost, by kHalfGradientScale, and the rest is the caller's.
template <class T>
float gradient_scale(double scale) {
  return std::is_same_v<T, float16> ? kHalfGradientScale : static_cast<float>(scale);
}

template <class T>
void loss_rows(const LossArguments& arguments) {
  const LossConfig& s = arguments.config;
  const ExitLogits* const exits = arguments.exits;
  int64_t labelled = 0;
  for (int64_t row = 0; row < s.rows; ++row) labelled += s.labels[row] != kUnlabelled;
  const double supervised_scale = 1.0 / static_cast<double>(labelled > 0 ? labelled : 1);
  const double consistency_scale = s.consistency_weight / static_cast<double>(s.rows);
  const double perturbed_scale = consistency_scale + s.supervise_perturbed * supervised_scale;
  const float consistency_share = perturbed_scale > 0.0 ? static_cast<float>(consistency_scale / perturbed_scale) : 0.0f;
  const float supervised_share =
      perturbed_scale > 0.0 ? static_cast<float>(s.supervise_perturbed * supervised_scale / perturbed_scale) : 0.0f;

  // Exponentials of the student, of the clean logits at each exit, of the teacher where it is the mean, and its logits.
  const int64_t padded = (s.classes + kLanes - 1) / kLanes * kLanes;
  const int64_t floats = (s.exits + 3) * padded;
  const int workers = workers_for(s.exits * s.rows * s.classes * 2 * kBytesPerLogit, arguments.threads);
  const Buffer<float> scratch(workers * floats);
  const Buffer<Softmax> softmaxes(workers * s.exits);
  const int64_t tasks = (s.rows + kRowsPerTask - 1) / kRowsPerTask;
  const Buffer<ExitTerms> sums(tasks * s.exits);
  for_each_task(workers, tasks, [&](int worker, int64_t task) {
    float* const student_exps = scratch.get() + worker * floats;
    float* const clean_exps = student_exps + padded;
    float* const mean_exps = clean_exps + s.exits * padded;
    float* const mean_logits = mean_exps + padded;
    Softmax* const clean = softmaxes.get() + worker * s.exits;
    ExitTerms* task_sums = sums.get() + task * s.exits;
    for (int64_t k = 0; k < s.exits; ++k) task_sums[k] = {};
    const int64_t end = (task + 1) * kRowsPerTask < s.rows ? (task + 1) * kRowsPerTask : s.rows;
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const auto clean_row = [&](int64_t k) { return static_cast<const T*>(exits[k].clean) + row * exits[k].clean_stride; };
      for (int64_t k = 0; k < s.exits; ++k) clean[k] = softmax(clean_row(k), s.classes, clean_exps + k * padded);
      const bool is_mean = s.teacher == Teacher::mean;
      Softmax mean = {};
      if (is_mean) mean = mean_softmax(clean, s.exits, s.classes, mean_exps, s.hard_target ? nullptr : mean_logits);
      const int64_t label = s.labels[row];
      for (int64_t k = 0; k < s.exits; ++k) {
        const ExitLogits& e = exits[k];
        const T* student_logits = static_cast<const T*>(e.perturbed) + row * e.perturbed_stride;
        const Softmax student = softmax(student_logits, s.classes, student_exps);

        if (label != kUnlabelled) {
          task_sums[k].supervised += clean[k].log_normalizer - to_float(clean_row(k)[label]);
          task_sums[k].supervised_perturbed += student.log_normalizer - to_float(student_logits[label]);
        }
        const int64_t taught_by = s.teacher == Teacher::self ? k : s.exits - 1;
        const Softmax& teacher = is_mean ? mean : clean[taught_by];
        const float confident = teacher.largest >= s.min_confidence ? 1.0f : 0.0f;
        int64_t target = -1;
        float divergence;
        if (s.hard_target) {
          target = is_mean ? argmax(mean_exps, s.classes, mean.largest) : argmax(clean_row(taught_by), s.classes, teacher.max);
          divergence = student.log_normalizer - to_float(student_logits[target]);
        } else if (is_mean) {
          divergence = soft_divergence(mean_logits, mean, student_logits, student, s.classes);
        } else {
          divergence = soft_divergence(clean_row(taught_by), teacher, student_logits, student, s.classes);
        }
        task_sums[k].confident += confident;
        task_sums[k].consistency += confident * divergence;

        if (e.clean_grad != nullptr) {
          T* grad = static_cast<T*>(e.clean_grad) + row * s.classes;
          supervised_gradient(clean[k], label, s.classes, gradient_scale<T>(e.weight * supervised_scale), grad);
        }
        if (e.perturbed_grad != nullptr) {
          T* grad = static_cast<T*>(e.perturbed_grad) + row * s.classes;
          const Shares shares = {consistency_share * confident, label != kUnlabelled ? supervised_share : 0.0f};
          const float scale = gradient_scale<T>(e.weight * perturbed_scale);
          if (consistency_share == 0.0f) {
            supervised_gradient(student, supervised_share > 0.0f ? label : kUnlabelled, s.classes, scale, grad);
          } else if (s.hard_target) {
            hard_gradient(target, student, shares, label, s.classes, scale, grad);
          } else {
            soft_gradient(teacher, student, shares, label, s.classes, scale, grad);
          }
        }
      }
    }
  });
  const double rows = static_cast<double>(s.rows);
  for (int64_t k = 0; k < s.exits; ++k) {
    ExitTerms total = {};
    for (int64_t task = 0; task < tasks; ++task) {
      const ExitTerms& part = sums.get()[task * s.exits + k];
      total.supervised += part.supervised;
      total.consistency += part.consistency;
      total.confident += part.confident;
      total.supervised_perturbed += part.supervised_perturbed;
    }
    arguments.terms[k] = {total.supervised * supervised_scale, total.consistency / rows, total.confident / rows,
                          total.supervised_perturbed * supervised_scale};
  }
}

}  // namespace

void consistent_exit_loss(const LossArguments& arguments) {
  switch (arguments.config.dtype) {
    case DType::float32: return loss_rows<float>(arguments);
    case DType::bfloat16: return loss_rows<bfloat16>(arguments);
    case DType::float16: return loss_rows<float16>(arguments);
  }
}

}  // namespace cet::CET_CAPABILITY
